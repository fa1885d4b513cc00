"""Measurements during training: condition numbers of layers, largest eigenvalues, stability thresholds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnp_analysis.curvature import CURVATURES, gauss_newton
from bnp_analysis.curvature.engines import curvature_names
from bnp_analysis.errors import InvalidInputError, MemoryLimitError, ZeroOperatorError
from bnp_analysis.linalg import Preconditioner, condition_number, congruence, eigenpairs
from bnp_analysis.linalg.derived import Shifted
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.network.snapshot import unwrap
from bnp_analysis.precondition import bnp_preconditioner, optimizer_preconditioner
from bnp_analysis.results import Result
from bnp_analysis.runtime.kinds import gated, require_loss
from bnp_analysis.symmetry import null_directions
from bnp_analysis.training.steps import kept_modes, require_same_model

Floats = NDArray[np.float64]
Probe = Callable[[int, nn.Module], Mapping[str, Any]]


def period(probe: Probe) -> int:
    """The number of steps between two measurements: `probe.every`, or 1.

    Raises:
        InvalidInputError: it is no positive integer.
    """
    every = getattr(probe, "every", 1)
    if not isinstance(every, int) or every < 1:
        raise InvalidInputError(f"a probe's `every` is a positive number of steps, not {every!r}")
    return every


def bound(probe: Probe, loss: Callable[..., Tensor], preconditioner: Any) -> Probe:
    """The probe, told what is trained if it wants to know (`probe.bind(loss, preconditioner)`)."""
    if not callable(probe):
        raise InvalidInputError(f"probes must be functions (step, model) -> dict, not {probe!r:.60}")
    period(probe)
    bind = getattr(probe, "bind", None)
    return bind(loss, preconditioner) if callable(bind) else probe


@dataclass(frozen=True)
class Every:
    """A probe that is called every few steps.

    Args:
        every: steps between two calls.
        probe: `probe(step, model) -> dict`.

    Example:
        >>> Every(100, lambda step, model: {"norm": 1.0}).every
        100
    """

    every: int
    probe: Probe

    @property
    def name(self) -> str:
        """Under which its measurements are listed."""
        return str(getattr(self.probe, "__name__", type(self.probe).__name__))

    def __call__(self, step: int, model: nn.Module) -> Mapping[str, Any]:
        return self.probe(step, model)


@dataclass(frozen=True)
class ConditionProbe:
    """How well conditioned a layer's Gauss-Newton block is along a run, without and with a preconditioner.

    Measured in float64 on the CPU, in evaluation mode. `P` is the one that trains, once it has seen a step; where
    none trains, the undamped BNP preconditioner of the data: what BNP would do here.

    Args:
        layer: name of a covered layer.
        every: steps between two measurements.
        data: `(x, y)` or batches; a few hundred examples are enough for most purposes.
        loss: default that of the run.
        preconditioner: a `BNP`; default that of the run.
        seed: of random starts.

    Returns:
        Called with `(step, model)`: `condition` and `condition_with_p`, their upper bounds `..._upper`, and
        `preconditioner`, "trained" or "exact". NaN where the block is zero.

    Example:
        >>> import bnp_analysis as bnp
        >>> data, model = bnp.data.load("digits", n=50), bnp.models.mlp([64, 4, 10])
        >>> probe = ConditionProbe("fc2", 100, data.tensors, torch.nn.functional.cross_entropy)
        >>> found = probe(0, model)
        >>> found["condition"] >= 1, found["preconditioner"]
        (True, 'exact')
    """

    layer: str
    every: int
    data: Any
    loss: Callable[..., Tensor] | None = None
    preconditioner: Any = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Under which its measurements are listed."""
        return f"condition of {self.layer}"

    def bind(self, loss: Callable[..., Tensor], preconditioner: Any) -> ConditionProbe:
        """The same probe with what was left open taken from the run."""
        own = self.preconditioner if self.preconditioner is not None else preconditioner
        return replace(self, loss=self.loss or loss, preconditioner=own)

    def __call__(self, step: int, model: nn.Module) -> dict[str, Any]:
        if self.loss is None:
            raise InvalidInputError("ConditionProbe needs loss= outside of a training run")
        with kept_modes(model):
            risk = EmpiricalRisk(model.eval(), self.loss, self.data, dtype=torch.float64, device="cpu")
        A = gauss_newton(risk, block=self.layer)
        try:
            null = null_directions(risk, block=self.layer)
        except MemoryLimitError:
            null = None
        trained = step > 0 and self.preconditioner is not None
        P = self.preconditioner.preconditioner().to(torch.float64, "cpu") if trained else bnp_preconditioner(risk)
        found: dict[str, Any] = {}
        for key, factor in (("condition", None), ("condition_with_p", P.block(self.layer))):
            found |= {key: math.nan, f"{key}_upper": math.nan}
            with suppress(ZeroOperatorError):
                k = condition_number(A, preconditioner=factor, null=null, seed=self.seed)
                found |= {key: k.value, f"{key}_upper": k.upper}
        return found | {"preconditioner": "trained" if trained else "exact"}


@dataclass(frozen=True, kw_only=True, repr=False)
class Sharpness(Result):
    """The largest eigenvalues of `P^T H P` along a run.

    Attributes:
        steps: `(t,)` optimizer steps made before each measurement.
        values: `(t, k)` eigenvalues, largest first; NaN where fewer were tracked.
        residuals: `(t, k)`: some eigenvalue lies within it of each value (T13).
        threshold: `(t,)` above which gradient descent on a quadratic diverges along the eigenvector; NaN where none is
            known for this optimizer and `P`.
        products: `(t,)` products with the curvature that each measurement took.
        preconditioner: what `P` is, in a word.
        why_no_threshold: empty, or why there is none.
    """

    steps: NDArray[np.int64]
    values: Floats
    residuals: Floats
    threshold: Floats
    products: NDArray[np.int64]
    preconditioner: str
    why_no_threshold: str = ""

    def summary(self) -> str:
        """The last measurement, in units of the threshold where there is one."""
        if not len(self.steps):
            return "sharpness: nothing measured yet"
        last, limit = self.values[-1], float(self.threshold[-1])
        shown = ", ".join(f"{v:.4g}" for v in last[np.isfinite(last)])
        edge = f"no threshold: {self.why_no_threshold}" if math.isnan(limit) else f"threshold {limit:.4g}"
        return (
            f"sharpness after {self.steps[-1]} steps, P = {self.preconditioner}: {shown} ({edge}); {len(self.steps)} "
            f"measurements, {self.matvecs} products"
        )

    def records(self) -> list[dict[str, Any]]:
        """One row per measurement and eigenvalue."""
        return [
            {
                "step": int(step),
                "index": i,
                "eigenvalue": float(value),
                "residual": float(self.residuals[row, i]),
                "threshold": float(self.threshold[row]),
            }
            for row, step in enumerate(self.steps)
            for i, value in enumerate(self.values[row])
            if math.isfinite(value)
        ]


class SharpnessTracker:
    """The `k` largest eigenvalues of `P^T H P` every few steps of a training loop, and where stability ends.

    Each search begins with the eigenvectors of the last one, carried on along the line through the last two where that
    was nearer the time before: it takes a fraction of the products of a search from nothing. When the smallest tracked
    value comes near the threshold, one more is tracked.
    Coupled weight decay `c` belongs to what is minimized: `H + c I` is measured then.

    Args:
        model, loss, data: what is trained, and on which data its curvature is measured, as for `EmpiricalRisk`; of
            mini-batch training all of them, or a fixed part.
        optimizer: whose thresholds hold, and whose `P`.
        preconditioner: `"optimizer"`, the `P` that the optimizer applies, `I` for SGD (see
            `optimizer_preconditioner`); None, `I`; `"bnp"`, the exact BNP preconditioner at each point; a `BNP`, the
            `P` that it trains with; a `Preconditioner`, a fixed one.
        k: how many eigenvalues to begin with.
        every: steps between two measurements.
        tol: residuals are at most this times the value, which then is that near to an eigenvalue.
        grow: one more value is tracked once the smallest tracked one exceeds this times the threshold.
        most: so many at most.
        curvature: `"hessian"` or `"gauss_newton"`.
        dtype: in which it is measured; None for the model's.
        max_matvecs: products of one measurement at most; what was reached is kept.
        output: picks the output tensor, as for `EmpiricalRisk`.
        seed: of random starts.

    Raises:
        InvalidInputError: numbers that make no sense, an unknown curvature or preconditioner.

    Source: thresholds: Cohen et al. 2021 (gradient descent, momentum, Nesterov), Cohen et al. 2022 (Adam: `38/lr` for
    `beta1 = 0.9`).

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.diag(torch.tensor([2.0, 1.0])), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> tracker = bnp.SharpnessTracker(model, torch.nn.functional.mse_loss, (x, y), optimizer, every=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(model(x), y).backward()
        ...     optimizer.step()
        ...     _ = tracker.step()
        >>> found = tracker.result()
        >>> found.steps.tolist(), found.values.round(6).tolist(), found.threshold.tolist()
        ([2, 4], [[4.0], [4.0]], [20.0, 20.0])
    """

    @gated
    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        data: Any,
        optimizer: torch.optim.Optimizer,
        *,
        preconditioner: Any = "optimizer",
        k: int = 1,
        every: int = 10,
        tol: float = 1e-2,
        grow: float = 0.8,
        most: int = 10,
        curvature: str = "hessian",
        dtype: torch.dtype | None = torch.float64,
        max_matvecs: int = 500,
        output: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        require_loss(loss)
        require_same_model(model, loss, optimizer)
        (curvature,) = curvature_names(curvature)
        if not _is_object(preconditioner) and preconditioner not in (None, "optimizer", "bnp"):
            raise InvalidInputError(
                f"preconditioner must be 'optimizer', 'bnp', None, a BNP or a Preconditioner, got {preconditioner!r}"
            )
        self.model, self.loss, self.data, self.optimizer = model, loss, data, optimizer
        self.preconditioner, self.every = preconditioner, every
        self._search: dict[str, Any] = {"tol": tol, "max_matvecs": max_matvecs}
        self._settings = self._search | {"grow": grow, "most": most, "curvature": curvature}
        self._dtype, self._seed, self._output = dtype, seed, output
        self.k, self._done = k, 0
        # The last eigenvectors and those before, and whether the line through both has led closer to the next ones.
        self._vectors: Tensor | None = None
        self._older: Tensor | None = None
        self._goes_on = False
        self._rows: list[dict[str, Any]] = []
        self._risk: EmpiricalRisk | None = None
        self._seconds = 0.0

    @property
    def name(self) -> str:
        """Under which its measurements are listed, as a probe of `train`."""
        return "sharpness"

    def step(self) -> dict[str, Any] | None:
        """Count an optimizer step; measure if it is time. Returns what was measured, or None."""
        self._done += 1
        return None if self._done % self.every else self.measure()

    def __call__(self, step: int, model: nn.Module) -> dict[str, Any]:
        """As a probe of `train`: measure after so many steps."""
        self._done = step
        found = self.measure(model)
        if found is None:
            return {}
        return {f"lambda_{i + 1}": v for i, v in enumerate(found["values"])} | {"threshold": found["threshold"]}

    def measure(self, model: nn.Module | None = None) -> dict[str, Any] | None:
        """Measure now: `step`, `values`, `residuals`, `threshold` and `products`.

        Returns:
            None before the optimizer's first step, where `P` is its own and does not exist yet.
        """
        if self._own and not self.optimizer.state and not isinstance(self.optimizer, torch.optim.SGD):
            return None
        began = time.perf_counter()
        model = self.model if model is None else model
        risk = self._at(model)
        B, P = CURVATURES[self._settings["curvature"]](risk, seed=self._seed), self._preconditioner(risk, model)
        if decay := _coupled_decay(self.optimizer):
            B = Shifted(B, decay)
        B = B if P is None else congruence(B, P)
        last, ahead = self._vectors, self._ahead()
        search: dict[str, Any] = {"start": "auto", "multiplicity": "trust", "seed": self._seed, **self._search}
        if last is not None:
            search["start"] = (ahead if self._goes_on else last).to(B.device, B.dtype)
        found = eigenpairs(B, min(self.k, B.dim), **search)
        if last is not None:
            self._goes_on = _apart(found.vectors, ahead) < _apart(found.vectors, last)
        self._older, self._vectors = last, found.vectors
        threshold, _ = self._threshold()
        row: dict[str, Any] = {
            "step": self._done,
            "values": found.values.tolist(),
            "residuals": found.residuals.tolist(),
            "threshold": threshold,
            "products": found.matvecs,
        }
        self._rows.append(row)
        if row["values"][-1] > self._settings["grow"] * threshold and self.k < self._settings["most"]:
            self.k += 1
        self._seconds += time.perf_counter() - began
        return row

    def result(self) -> Sharpness:
        """Everything measured so far."""
        names = ("step", "values", "residuals", "threshold", "products")
        steps, values, residuals, threshold, products = ([row[name] for row in self._rows] for name in names)

        width = max(map(len, values), default=0)

        def padded(rows: list[list[float]]) -> Floats:
            filled = [row + [math.nan] * (width - len(row)) for row in rows]
            return np.array(filled, dtype=np.float64).reshape(len(rows), width)

        return Sharpness(
            steps=np.array(steps, dtype=np.int64),
            values=padded(values),
            residuals=padded(residuals),
            threshold=np.array(threshold, dtype=np.float64),
            products=np.array(products, dtype=np.int64),
            preconditioner=self._word,
            why_no_threshold=self._threshold()[1],
            settings=self._settings | {"every": self.every, "optimizer": type(self.optimizer).__name__},
            seed=self._seed,
            matvecs=sum(products),
            seconds=self._seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that another process needs to go on: measurements, eigenvectors, how many are tracked, steps."""
        vectors = {"vectors": self._vectors, "older": self._older, "goes_on": self._goes_on}
        return vectors | {"rows": [dict(row) for row in self._rows], "k": self.k, "done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            InvalidInputError: it is none, or of a model of another size.
        """
        if not isinstance(state, Mapping) or set(state) != set(self.state_dict()):
            raise InvalidInputError("this is no state of a SharpnessTracker: state_dict() makes one")
        vectors = state["vectors"]
        dim = sum(p.numel() for p in unwrap(self.model).parameters() if p.requires_grad)
        if vectors is not None and vectors.shape[0] != dim:
            raise InvalidInputError(f"the saved eigenvectors have {vectors.shape[0]} entries, the model {dim}")
        self._rows, self._vectors = [dict(row) for row in state["rows"]], vectors
        self._older, self._goes_on = state["older"], bool(state["goes_on"])
        self.k, self._done = int(state["k"]), int(state["done"])

    def _ahead(self) -> Any:
        """Where eigenvectors come to that move on as they did: `2 V - V' Q`, where `Q` turns the older `V'` to `V`."""
        older, last = self._older, self._vectors
        if last is None or older is None or older.shape != last.shape:
            return last
        U, _, Vh = torch.linalg.svd(older.T @ last)
        return 2 * last - older @ (U @ Vh)

    @property
    def _own(self) -> bool:
        return isinstance(self.preconditioner, str) and self.preconditioner == "optimizer"

    @property
    def _word(self) -> str:
        named = {"optimizer": f"{type(self.optimizer).__name__}'s", "bnp": "bnp"}
        given = self.preconditioner
        return "I" if given is None else named[given] if isinstance(given, str) else type(given).__name__

    def _at(self, model: nn.Module) -> EmpiricalRisk:
        """The risk where the model is now; its checks run once."""
        if self._risk is None:
            with kept_modes(model):
                self._risk = EmpiricalRisk(model.eval(), self.loss, self.data, dtype=self._dtype, output=self._output)
            return self._risk
        return self._risk.at(unwrap(model).state_dict())

    def _preconditioner(self, risk: EmpiricalRisk, model: nn.Module) -> Preconditioner | None:
        if self._own:
            plain = isinstance(self.optimizer, torch.optim.SGD)
            return None if plain else optimizer_preconditioner(self.optimizer, model, space=risk)
        if isinstance(self.preconditioner, str):
            return bnp_preconditioner(risk)
        if self.preconditioner is None or isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner
        found: Preconditioner = self.preconditioner.preconditioner(risk.space)
        return found

    def _threshold(self) -> tuple[float, str]:
        """The threshold, and why there is none."""
        trains = self._own or (
            isinstance(self.optimizer, torch.optim.SGD) and not isinstance(self.preconditioner, str | Preconditioner)
        )
        if not trains:
            return math.nan, f"P = {self._word} is not what {type(self.optimizer).__name__} applies"
        return stability_threshold(self.optimizer)


def _apart(vectors: Tensor, start: Tensor) -> float:
    """How much of orthonormal columns lies outside of the span of others."""
    basis = torch.linalg.qr(start)[0]
    return float((vectors - basis @ (basis.T @ vectors)).norm())


def _is_object(preconditioner: Any) -> bool:
    return isinstance(preconditioner, Preconditioner) or callable(getattr(preconditioner, "preconditioner", None))


def _heavy_ball(group: Mapping[str, Any]) -> float:
    beta = float(group["momentum"])
    if group.get("nesterov"):
        return (2 + 2 * beta) / (1 + 2 * beta)
    return (2 + 2 * beta) / (1 - float(group.get("dampening", 0.0)) * (beta > 0))


def _averaged(group: Mapping[str, Any]) -> float:
    """Of an averaged gradient, `m = beta m + (1 - beta) g`; decoupled decay multiplies theta by `1 - lr c`."""
    beta, decay = float(group["betas"][0]), float(group["lr"]) * float(group["weight_decay"])
    decoupled = bool(group.get("decoupled_weight_decay", False))
    return (1 + beta) * (2 - decay * decoupled) / (1 - beta)


def _adagrad(group: Mapping[str, Any]) -> float:
    return 2.0 if not group["lr_decay"] else math.nan  # its rate depends on the step


#: Kind of optimizer -> `lr` times the threshold.
THRESHOLDS: dict[type, Callable[[Mapping[str, Any]], float]] = {
    torch.optim.SGD: _heavy_ball,
    torch.optim.RMSprop: _heavy_ball,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adam: _averaged,
    torch.optim.LBFGS: lambda group: 2.0 if not group["line_search_fn"] else math.nan,
}


@gated
def stability_threshold(optimizer: torch.optim.Optimizer) -> tuple[float, str]:
    """The largest eigenvalue of `P^T H P` at which an optimizer is stable on a quadratic, `P` being its own.

    `2/lr` for gradient descent; with momentum `(2 + 2 beta) / ((1 - dampening) lr)`, Nesterov's
    `(2 + 2 beta) / ((1 + 2 beta) lr)`; for Adam, which averages gradients, `(2 + 2 beta) / ((1 - beta) lr)`, `38/lr`
    for `beta = 0.9`. Derived with `P` held fixed.

    Args:
        optimizer: with one learning rate for all parameters.

    Returns:
        The threshold, NaN where there is none, and then why.

    Source: Cohen et al. 2021, 2022: both roots of the recursion's characteristic polynomial inside the unit circle.

    Example:
        >>> import torch
        >>> p = [torch.nn.Parameter(torch.zeros(1))]
        >>> round(stability_threshold(torch.optim.Adam(p, lr=1e-2))[0])
        3800
    """
    own = next((find for kind, find in THRESHOLDS.items() if isinstance(optimizer, kind)), None)
    if own is None:
        return math.nan, f"none is known for {type(optimizer).__name__}"
    rates = ((group, float(group["lr"])) for group in optimizer.param_groups)
    found = {own(group) / rate if rate > 0 else math.nan for group, rate in rates}
    if not found:
        return math.nan, "the optimizer has no parameter groups"
    if len(found) > 1 or len(set(map(_decay, optimizer.param_groups))) > 1:
        return math.nan, "the parameter groups have different rates, momenta or weight decays"
    (value,) = found
    return value, "a rate that decays by itself, a line search, or a rate of zero" if math.isnan(value) else ""


def _decay(group: Mapping[str, Any]) -> float:
    """Weight decay that is added to the gradient."""
    return 0.0 if group.get("decoupled_weight_decay", False) else float(group.get("weight_decay", 0.0))


def _coupled_decay(optimizer: torch.optim.Optimizer) -> float:
    """The same for all groups, where it is one number."""
    found = set(map(_decay, optimizer.param_groups))
    return found.pop() if len(found) == 1 else 0.0
