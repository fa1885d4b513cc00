"""Stochastic gradient Langevin dynamics, plain and preconditioned: a sampler with the interface of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.parameters import clean_name
from bnp_analysis.network.snapshot import require_values, unwrap
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.random import generator, normal
from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.bnp.layers import trainable_space


class SGLD(Optimizer):
    """Samples parameters from `exp(-U/T)` by gradients of `U`: stochastic gradient Langevin dynamics.

    `theta <- theta - (lr/2) P P^T grad U + sqrt(lr T) P xi`, with standard normal `xi`.

    For a fixed `P` the law `exp(-U/T)` is invariant as `lr -> 0`, whatever `P` is, and `P` decides how fast it is
    reached. At a positive rate the law of a quadratic `U` with the matrix `A` has the right mean and the covariance
    `T P (B - lr B^2 / 4)^-1 P^T`, `B = P^T A P`, in place of `T A^-1`; steps are stable where `lr lambda_max(B) < 4`,
    and a mode's autocorrelation falls by `1 - lr lambda / 2` in a step: at a given bias the number of steps between
    independent samples grows like `kappa(B)`.

    Args:
        params: `model.parameters()`, or parameter groups; only those that train are moved.
        lr: `epsilon`, positive. It may be scheduled.
        preconditioner: a fixed `P` such as `bnp.bnp_preconditioner(risk)`, on the trained parameters in the order
            in which they are given; or `bnp.BNP(model)`, whose running `P` follows the training: this optimizer calls
            its `step()`, the loop does not. None for `P = I`.
        temperature: `T`, at least 0, where it is gradient descent at `lr/2`. Where the loss is a mean over `N`
            examples, `U = N loss`: take `T = 1/N` with the loss as it is.
        seed: of a generator of its own; in distributed training the same everywhere.

    Raises:
        InvalidInputError: numbers out of range, parameters that are sharded or no real numbers, a `P` of another
            dimension, a BNP of another model or one that is attached.

    A running `P` depends on the parameters, and the exact dynamics would have the drift `(lr/2) div(P P^T)` besides,
    which is left out. It is zero for exact moments of a feed-forward network without output scales and shared
    layers: the `P` of a layer depends on the layers below, never on its own weights. What remains is the lag of the
    averages and their noise, which `benchmarks/langevin.py` measures.

    This is this project's construction, after the abstract of a follow-up paper whose text was not available;
    nothing here is claimed to be its algorithm.

    Source: Welling and Teh 2011; with preconditioning Li, Chen, Carlson and Carin 2016; with BNP the abstract of Lange,
    Deng, Ye and Lin, J. Mach. Learn. 2(1), 2023.

    Example:
        >>> import torch
        >>> theta = torch.nn.Parameter(torch.zeros(1000, dtype=torch.float64))
        >>> sampler = SGLD([theta], lr=0.1)
        >>> for _ in range(100):
        ...     sampler.zero_grad()
        ...     (8 * theta.square().sum() / 2).backward()
        ...     _ = sampler.step()
        >>> bool(abs(theta.var() * 8 * (1 - 0.1 * 8 / 4) - 1) < 0.15)
        True
    """

    not_attached = (
        "the noise of SGLD has to be preconditioned as its gradient is, or it samples another law: write "
        "SGLD(model.parameters(), lr=..., preconditioner=pre) in place of attach"
    )

    @gated
    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        preconditioner: Preconditioner | BNP | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        _require_number("temperature", temperature)
        self._generator = generator(seed)
        self.preconditioner = preconditioner
        super().__init__(_given(params), {"lr": lr, "temperature": temperature})
        self._require_fit()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the chain; the generator moves on by one number per parameter.

        Args:
            closure: evaluates the loss and its gradients again, as for any optimizer.

        Returns:
            What the closure returned.

        Raises:
            InvalidInputError: sparse gradients; with a preconditioner, groups with rates of their own, or with a fixed
                one parameters without gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = self._moving()
        if isinstance(self.preconditioner, Preconditioner):
            self._step_fixed(self.preconditioner, held)
        elif self.preconditioner is not None:
            self._step_running(self.preconditioner, held)
        else:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        noise = normal(p.shape, self._generator, p)
                        p.add_(p.grad, alpha=-group["lr"] / 2).add_(noise, alpha=_noise(group))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of the groups, the generator and a running preconditioner: the chain goes on from it bit for bit."""
        pre = self.preconditioner.state_dict() if isinstance(self.preconditioner, BNP) else None
        return {**super().state_dict(), "generator": self._generator.get_state(), "preconditioner": pre}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            InvalidInputError: it is none of this class, or of another model; nothing has changed then.
        """
        _require_state(state_dict, self.param_groups, isinstance(self.preconditioner, BNP))
        if isinstance(self.preconditioner, BNP):
            self.preconditioner.load_state_dict(state_dict["preconditioner"])
        super().load_state_dict({"state": state_dict["state"], "param_groups": state_dict["param_groups"]})
        self._generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "preconditioner": self.preconditioner, "_generator": self._generator}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _moving(self) -> list[Tensor]:
        held = [p for p in self._parameters() if p.grad is not None]
        if any(p.grad is not None and p.grad.layout is not torch.strided for p in held):
            raise InvalidInputError("SGLD needs dense gradients, some are sparse: make the layer with sparse=False")
        return held

    def _common(self) -> dict[str, Any]:
        """The settings of all groups, which a preconditioner needs to be the same."""
        first = self.param_groups[0]
        if any(group[name] != first[name] for group in self.param_groups for name in ("lr", "temperature")):
            raise InvalidInputError(
                "a preconditioner mixes parameters, so that all groups need one lr= and one temperature=: the invariant"
                " law would be another. Give each group the same, or an optimizer to each model"
            )
        return first

    def _step_fixed(self, P: Preconditioner, held: list[Tensor]) -> None:
        group, every = self._common(), self._parameters()
        if len(held) < len(every) or sum(p.numel() for p in every) != P.dim:
            raise InvalidInputError(
                f"{len(held)} of {len(every)} parameters have gradients, {sum(p.numel() for p in held)} numbers, and P "
                f"acts on {P.dim}: let the loss depend on all of them, or make P of those that train"
            )
        like = torch.empty(0, dtype=P.dtype, device=P.device)
        g = torch.cat([p.grad.reshape(-1).to(like) for p in held if p.grad is not None])
        xi = normal((P.dim,), self._generator, like)
        _add(held, P.apply(P.apply_transpose(g) * (-group["lr"] / 2) + xi * _noise(group)))

    def _step_running(self, pre: BNP, held: list[Tensor]) -> None:
        group = self._common()
        pre.step()  # .grad is P P^T grad now
        moved = {id(p) for p in held}
        model = unwrap(pre.model)
        space = trainable_space(model)
        tensors = _named(model)
        space = space.restrict([name for name in space.names if id(tensors[name]) in moved])
        P = pre.preconditioner(space)
        xi = normal((P.dim,), self._generator, torch.empty(0, dtype=P.dtype, device=P.device))
        for p in held:
            p.add_(p.grad, alpha=-group["lr"] / 2)  # type: ignore[arg-type] # held: those with gradients
        _add([tensors[name] for name in space.names], P.apply(xi) * _noise(group))

    def _require_fit(self) -> None:
        every = self._parameters()
        if any(hasattr(p, "to_local") or not p.is_floating_point() for p in every):
            raise InvalidInputError("params must be real and whole on each process, not sharded (DTensor) or complex")
        pre = self.preconditioner
        if isinstance(pre, Preconditioner):
            numbers = sum(p.numel() for p in every)
            if numbers != pre.dim:
                raise InvalidInputError(
                    f"preconditioner acts on {pre.dim} numbers, params that train have {numbers}: make it of a risk of "
                    "this model, bnp.bnp_preconditioner(bnp.EmpiricalRisk(model, loss, data))"
                )
        elif pre is not None:
            own = {id(p) for p in unwrap(pre.model).parameters() if p.requires_grad}
            if own != {id(p) for p in every}:
                raise InvalidInputError(
                    "params and preconditioner must have the same parameters: P would mix some that are not moved. "
                    "Write bnp.SGLD(model.parameters(), lr=..., preconditioner=bnp.BNP(model))"
                )
            pre.require_free()


def _given(params: Iterable[Any]) -> list[Any]:
    """The parameters as a list, without the names that `named_parameters()` gives."""
    if isinstance(params, Tensor | str | bytes) or not isinstance(params, Iterable):
        raise InvalidInputError(
            f"params must be model.parameters() or groups of them, not {type(params).__name__}: one tensor is [tensor]"
        )
    found = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in params]
    if not found:
        raise InvalidInputError("params is empty: an iterator of parameters can be read only once")
    wrong = next((item for item in found if not isinstance(item, Tensor | dict)), None)
    if wrong is not None:
        raise InvalidInputError(f"params must hold tensors or groups of them, not {type(wrong).__name__}")
    require_values({f"params[{i}]": item.device for i, item in enumerate(found) if isinstance(item, Tensor)})
    return found


def _named(model: torch.nn.Module) -> dict[str, Tensor]:
    return {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def _noise(group: Mapping[str, Any]) -> float:
    for name in ("lr", "temperature"):  # a schedule may have set them
        _require_number(name, group[name])
    return math.sqrt(group["lr"] * group["temperature"])


def _add(tensors: list[Tensor], flat: Tensor) -> None:
    parts = torch.split(flat, [p.numel() for p in tensors])
    for p, part in zip(tensors, parts, strict=True):
        p.add_(part.view(p.shape).to(p))


def _require_number(name: str, value: object) -> None:
    if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf):
        raise InvalidInputError(f"{name} must be a number of at least 0, got {value!r}")


def _require_state(state: object, groups: list[dict[str, Any]], running: bool) -> None:
    """Refuse what `state_dict` did not give, before anything is changed."""
    known = isinstance(state, Mapping) and {"state", "param_groups", "generator", "preconditioner"} <= state.keys()
    if not known:
        raise InvalidInputError("this is no state of SGLD: it has no generator, and the chain could not go on from it")
    assert isinstance(state, Mapping)
    saved = state["param_groups"]
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        raise InvalidInputError("the state of SGLD comes from other parameter groups; nothing was changed")
    for group in saved:
        for name in ("lr", "temperature"):
            _require_number(name, group.get(name))
    if (state["preconditioner"] is not None) != running:
        raise InvalidInputError(
            f"the state of SGLD was saved {'without' if running else 'with'} a running preconditioner; nothing was "
            "changed. Make SGLD with the same preconditioner="
        )
    try:
        torch.Generator().set_state(state["generator"].cpu())
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"the state of SGLD has a damaged generator ({error}); nothing was changed") from error
