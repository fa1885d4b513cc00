"""Measurements along a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.curvature import gauss_newton
from bnp_analysis.errors import InvalidInputError, MemoryLimitError, ZeroOperatorError
from bnp_analysis.linalg import ConditionNumber, condition_number
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.symmetry import null_directions
from bnp_analysis.training.steps import kept_modes

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
            k = self._measure(A, factor, null)
            found |= {
                key: float("nan") if k is None else k.value,
                f"{key}_upper": float("nan") if k is None else k.upper,
            }
        return found | {"preconditioner": "trained" if trained else "exact"}

    def _measure(self, A: Any, P: Any, null: Any) -> ConditionNumber | None:
        try:
            return condition_number(A, preconditioner=P, null=null, seed=self.seed)
        except ZeroOperatorError:
            return None
