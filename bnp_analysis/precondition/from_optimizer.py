"""The preconditioner of an optimizer, read from its state if it is a fixed positive definite map."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.parameters import ParameterSpace, choose_parameters
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.snapshot import unwrap
from bnp_analysis.precondition.base import BlockDiagonal, Entry, NetworkPreconditioner, identity_preconditioner
from bnp_analysis.precondition.diagonal import (
    ADAPTIVE,
    DiagonalPreconditioner,
    adaptive_preconditioner,
    named_parameters,
    read_states,
    require_shape,
    steps_as,
)
from bnp_analysis.runtime.kinds import gated

#: What reads an optimizer's state: (optimizer, space, model) -> P.
Reader = Callable[[torch.optim.Optimizer, ParameterSpace, nn.Module | None], NetworkPreconditioner]


@gated
def optimizer_preconditioner(
    optimizer: torch.optim.Optimizer,
    model: nn.Module | None = None,
    *,
    space: ParameterSpace | EmpiricalRisk | None = None,
) -> NetworkPreconditioner:
    """The `P` with which an optimizer's step is `-lr P P^T g`, read from its state as it is now.

    Learning rate, momentum and weight decay are no part of it; where groups of parameters have different rates, `lr` is
    the largest and their ratios to it are part of `P`. `g` is the gradient that the optimizer reads, behind what hooks
    such as those of `BNP.attach` make of it. The condition number of `P^T A P` is that of what this
    optimizer leaves to the learning rate; `diagnose.preconditioner_report(P)` describes `P` itself.

    Args:
        optimizer: after some steps:
            SGD: `P = I`, which needs no step;
            Adam, AdamW, RMSprop, Adagrad: `P = diag((sqrt(v_hat) + eps)^(-1/2))` (T15);
            LBFGS: the two-loop recursion's inverse Hessian, as a product of rank-one changes of `I`;
            Shampoo of the package `pytorch_optimizer`: a Kronecker product for each tensor;
            SOAP of it: Adam's diagonal in the eigenbasis of Shampoo's factors.
        model: the module whose parameters the optimizer holds, by which they are named; not needed for an optimizer
            made from `model.named_parameters()` if `space=` is given.
        space: the chart of `P`, or the risk whose it is; default all parameters of the model that need a gradient.

    Returns:
        A `NetworkPreconditioner` over `space`. Parameters that the optimizer has not stepped are left alone and named
        in `uncovered`.

    Raises:
        InvalidInputError: no step yet; an optimizer whose step is no fixed positive definite map of the gradient, such
            as Muon, or one with `maximize`, which steps along the gradient; one that is not known, or a class made from
            a known one with a step of its own; another model; `param_groups` of which L-BFGS couples some outside.

    Source: T15; Nocedal 1980 for L-BFGS, Brodlie, Gourlay and Greenstadt 1973 for its product form; Gupta, Koren and
    Singer 2018 (Shampoo); Vyas et al. 2024 (SOAP).

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> adam = torch.optim.Adam(model.parameters(), eps=0)
        >>> _ = (4 * model.weight.sum()).backward(), adam.step()
        >>> round(bnp.optimizer_preconditioner(adam, model).apply(torch.ones(1)).item(), 4)
        0.5
    """
    if isinstance(space, EmpiricalRisk):
        space = space.space
    if space is None:
        if model is None:
            raise InvalidInputError("give model=, whose parameters the optimizer holds, or space=, the chart of P")
        space = choose_parameters(unwrap(model), None)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if model is not None and not any(id(p) in held for p in model.parameters()):
        raise InvalidInputError("the optimizer holds no parameter of model: it was made for another one, or for a copy")
    return _reader(optimizer)(optimizer, space, model)


def _reader(optimizer: torch.optim.Optimizer) -> Reader:
    """What reads this kind of optimizer's state; an optimizer of another package is known by its own and its name."""
    if any(group.get("maximize", False) for group in optimizer.param_groups):
        raise InvalidInputError(
            "the optimizer has maximize=True, so that its step is +lr P P^T g: minimize the loss with the other sign"
        )
    for kind, reader in READERS.items():
        if steps_as(optimizer, kind):
            return reader
    home, name = type(optimizer).__module__.partition(".")[0], type(optimizer).__name__
    foreign = FOREIGN.get((home, name))
    if foreign is not None:
        return foreign
    raise InvalidInputError(
        f"{name} ({type(optimizer).__module__}) is not known here: what it multiplies gradients by cannot be read from "
        f"its state. Known are {', '.join(sorted(kind.__name__ for kind in READERS))}, and of pytorch_optimizer "
        f"{', '.join(sorted(own for _, own in FOREIGN))}. Give its scales to diagonal_preconditioner(risk, tensor), or "
        "P itself as a DensePreconditioner"
    )


def _sgd(optimizer: torch.optim.Optimizer, space: ParameterSpace, model: nn.Module | None) -> NetworkPreconditioner:
    if len({float(group["lr"]) for group in optimizer.param_groups}) == 1:
        return identity_preconditioner(space)  # which needs no names
    found, uncovered = read_states(optimizer, space, model, lambda p, group, state, rate: torch.full_like(p, rate**0.5))
    scales = {name: found.get(name, torch.ones(shape)).detach().cpu() for name, shape in space.shapes.items()}
    return DiagonalPreconditioner(
        space.flatten(scales).to(space.device, space.dtype), space, settings={"source": "SGD"}, uncovered=uncovered
    )  # fmt: skip


def _lbfgs(optimizer: torch.optim.Optimizer, space: ParameterSpace, model: nn.Module | None) -> NetworkPreconditioner:
    """All parameters in one block, in the order in which the optimizer flattens them."""
    (group,) = optimizer.param_groups  # torch allows one
    state = optimizer.state.get(group["params"][0], {})
    pairs = list(zip(state.get("old_stps") or [], state.get("old_dirs") or [], strict=True))
    if not pairs:
        raise InvalidInputError(
            "LBFGS holds no pair of a step and a change of the gradient: it has made fewer than two iterations, and "
            "P would be the identity. Call optimizer.step(closure) first, with max_iter of at least 2"
        )
    names = {id(p): name for p, _, name in named_parameters(optimizer, model) if name in space}
    missing = [tuple(p.shape) for p in group["params"] if id(p) not in names]
    if missing:
        raise InvalidInputError(
            f"LBFGS couples all its parameters, and {len(missing)} of them (shapes {missing}) are not in the space of "
            "P: a part of its map is none. Take a risk over all of them"
        )
    positions = []
    for p in group["params"]:
        name = names[id(p)]
        require_shape(p, name, space)
        part = space.slice_of(name)
        positions.append(torch.arange(part.start, part.stop))
    inner = LBFGSBlock(
        [(s.detach().double(), y.detach().double()) for s, y in pairs], float(state["H_diag"]), dtype=space.dtype
    )
    covered = {space.canonical(name) for name in names.values()}
    return BlockDiagonal(
        space.dim,
        {"LBFGS": (torch.cat(positions), inner)},
        space.dtype,
        space.device,
        space,
        settings={"source": "LBFGS", "pairs": len(pairs)},
        uncovered=dict.fromkeys((n for n in space.names if n not in covered), "not among the optimizer's parameters"),
    )


#: Of one tensor, from itself, its group and its state: the factors of a Kronecker product, and scales or None for ones.
Roots = tuple[list[Tensor], Tensor | None]


def _shampoo(
    optimizer: torch.optim.Optimizer, p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Roots | None:
    inverses = [state[f"inv_pre_cond_{i}"] for i in range(p.ndim) if f"inv_pre_cond_{i}" in state]
    if len(inverses) < p.ndim or not p.ndim or not all(bool(m.any()) for m in inverses):
        return None  # no step at which the factors are computed
    return [_root(m.detach().double()) for m in inverses], None


def _soap(
    optimizer: torch.optim.Optimizer, p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Roots | None:
    if group["normalize_gradient"]:
        raise InvalidInputError(
            "SOAP with normalize_gradient divides each step by its own length: that is no linear map of the "
            "gradient. Without it, it is"
        )
    steps = int(group.get("step", 0)) - 1  # its first step only initializes
    if steps < 1 or state.get("Q") is None:
        return None
    shape = tuple(int(n) for n in p.shape)
    if group["merge_dims"]:
        if getattr(optimizer, "data_format", "channels_first") != "channels_first" and p.ndim == 4:
            raise InvalidInputError("SOAP with merge_dims and data_format='channels_last' is not read here")
        shape = tuple(len(q) for q in state["Q"]) if all(len(q) for q in state["Q"]) else shape
        if math.prod(shape) != p.numel():
            raise InvalidInputError("SOAP merged dimensions in a way that its state does not tell")
    factors = [
        q.detach().double() if len(q) else torch.eye(n, dtype=torch.float64, device=p.device)
        for q, n in zip(state["Q"], shape, strict=True)
    ]
    square = state["exp_avg_sq"].detach().double().reshape(-1)
    # The optimizer adds eps to the uncorrected root; the correction is a factor of its learning rate.
    correction = math.sqrt(1 - float(group["betas"][1]) ** steps) if group["correct_bias"] else 1.0
    divisor = (square.sqrt() + float(group["eps"])) / correction
    if not bool((divisor > 0).all()):
        raise InvalidInputError("SOAP divides by zero: a direction without gradient and eps = 0")
    return factors, divisor.rsqrt()


def _at_rate(roots: Roots | None, rate: float) -> Roots | None:
    return None if roots is None else ([roots[0][0] * rate**0.5, *roots[0][1:]], roots[1])


def _by_tensor(
    optimizer: torch.optim.Optimizer,
    space: ParameterSpace,
    model: nn.Module | None,
    *,
    read: Callable[[torch.optim.Optimizer, Tensor, Mapping[str, Any], Mapping[str, Any]], Roots | None],
) -> NetworkPreconditioner:
    """`P` of an optimizer that multiplies each tensor by a Kronecker product, which `read` finds."""
    found, uncovered = read_states(
        optimizer, space, model, lambda p, group, state, rate: _at_rate(read(optimizer, p, group, state), rate)
    )
    blocks: dict[str, Entry] = {}
    for name, (factors, scales) in found.items():
        part = space.slice_of(name)
        blocks[name] = (torch.arange(part.start, part.stop), KroneckerRoots(factors, scales, dtype=space.dtype))
    settings = {"source": type(optimizer).__name__}
    return BlockDiagonal(
        space.dim, blocks, space.dtype, space.device, space, settings=settings, uncovered=uncovered
    )  # fmt: skip


def _muon(optimizer: torch.optim.Optimizer, space: ParameterSpace, model: nn.Module | None) -> NetworkPreconditioner:
    raise InvalidInputError(
        f"{type(optimizer).__name__} replaces the singular values of a gradient by ones: a step does not grow with the "
        "gradient, and is no linear map P P^T of it, so that P^T A P would be the curvature of nothing. Measure "
        "without P; or with Shampoo's P, whose step without memory has the same direction"
    )


#: Kind of optimizer -> what reads its state.
READERS: dict[type, Reader] = dict.fromkeys(ADAPTIVE, adaptive_preconditioner)
READERS[torch.optim.SGD] = _sgd
READERS[torch.optim.LBFGS] = _lbfgs
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    READERS[torch.optim.Muon] = _muon
#: The same by package and name, for packages that need not be installed.
FOREIGN: dict[tuple[str, str], Reader] = {
    ("pytorch_optimizer", "Shampoo"): partial(_by_tensor, read=_shampoo),
    ("pytorch_optimizer", "SOAP"): partial(_by_tensor, read=_soap),
    ("pytorch_optimizer", "Muon"): _muon,
}


class LBFGSBlock(Preconditioner):
    """`P = (I - s_k w_k^T) ... (I - s_1 w_1^T) sqrt(gamma)`, with `P P^T` the inverse Hessian of L-BFGS.

    Each pair changes `H` into `(I - rho s y^T) H (I - rho y s^T) + rho s s^T`, `rho = 1 / s.y`, which is
    `P+ P+^T` for `P+ = (I - s w^T) P`, `w = rho (y - tau H^-1 s)`, `tau = sqrt(s.y / s.H^-1 s)`; and
    `(I - s w^T)^-1 = I + tau s w^T`. Nothing is squared, and nothing of size `n x n` is formed.

    Args:
        pairs: the steps `s` and changes `y` of the gradient, `(n,)` each, the oldest first, `s.y > 0`.
        gamma: the first inverse Hessian is `gamma I`.
        dtype: of the variables, default that of the pairs; these may be more precise.

    Raises:
        InvalidInputError: a pair with `s.y <= 0`, of which no positive definite map has both.

    Source: Nocedal 1980; Brodlie, Gourlay and Greenstadt 1973.

    Example:
        >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0])
        >>> LBFGSBlock([(s, y)], 1.0).direction(y).tolist()
        [1.0, 0.0]
    """

    def __init__(
        self, pairs: Sequence[tuple[Tensor, Tensor]], gamma: float, *, dtype: torch.dtype | None = None
    ) -> None:
        first = pairs[0][0]
        super().__init__(first.numel(), dtype or first.dtype, first.device)
        if not 0 < gamma < math.inf:
            raise InvalidInputError(f"the first inverse Hessian gamma I must be positive and finite, got {gamma}")
        self._size = math.sqrt(gamma)
        changes: list[tuple[Tensor, Tensor]] = []
        self._taus: list[float] = []
        for s, y in pairs:
            along = float(s @ y)
            if not 0 < along < math.inf:
                raise InvalidInputError(f"a pair has s.y = {along:.3g}: L-BFGS's inverse Hessian is not positive")
            half = self._back(s.unsqueeze(1), changes)  # P^-1 s
            tau = math.sqrt(along / float(half.square().sum()))
            image = self._back_transposed(half, changes).squeeze(1)  # P^-T P^-1 s
            changes.append((s, (y - tau * image) / along))
            self._taus.append(tau)
        self._changes = [(s.to(self.dtype), w.to(self.dtype)) for s, w in changes]

    def _matmat(self, x: Tensor) -> Tensor:
        x = self._size * x
        for s, w in self._changes:
            x = x - torch.outer(s, w @ x)
        return x

    def _rmatmat(self, y: Tensor) -> Tensor:
        for s, w in reversed(self._changes):
            y = y - torch.outer(w, s @ y)
        return self._size * y

    def _solve(self, x: Tensor) -> Tensor:
        return self._back(x, self._changes)

    def _rsolve(self, y: Tensor) -> Tensor:
        return self._back_transposed(y, self._changes)

    def _back(self, x: Tensor, changes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        for (s, w), tau in zip(reversed(changes), reversed(self._taus), strict=True):
            x = x + tau * torch.outer(s, w @ x)
        return x / self._size

    def _back_transposed(self, y: Tensor, changes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        y = y / self._size
        for (s, w), tau in zip(changes, self._taus, strict=True):
            y = y + tau * torch.outer(w, s @ y)
        return y

    @property
    def roundings(self) -> int:
        return len(self._changes) * (self.dim + 4) + 2

    def absolute(self) -> LinearOperator:
        other = copy.copy(self)
        other._changes = [(s.abs(), -w.abs()) for s, w in self._changes]
        return other


class KroneckerRoots(Preconditioner):
    """`P = (C_1 (x) ... (x) C_d) diag(scales)` on a tensor with `d` dimensions, row-major.

    Args:
        factors: `C_i`, square and invertible, one for each dimension.
        scales: positive, `(n,)`; default ones.
        dtype: of the variables, default that of the factors; these may be more precise.

    Raises:
        InvalidInputError: a factor that is singular to rounding.

    Example:
        >>> P = KroneckerRoots([torch.tensor([[2.0]]), torch.diag(torch.tensor([1.0, 3.0]))])
        >>> P.apply(torch.ones(2)).tolist()
        [2.0, 6.0]
    """

    def __init__(
        self, factors: Sequence[Tensor], scales: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        sizes = [len(factor) for factor in factors]
        super().__init__(math.prod(sizes), dtype or factors[0].dtype, factors[0].device)
        self._sizes = sizes
        for factor in factors:
            singular = torch.linalg.svdvals(factor.double())
            if not float(singular[-1]) > len(factor) * torch.finfo(torch.float64).eps * float(singular[0]):
                raise InvalidInputError(
                    f"a Kronecker factor of the optimizer is singular to rounding: its singular values run from "
                    f"{float(singular[0]):.3g} to {float(singular[-1]):.3g}. A larger eps makes it definite"
                )
        self._factors = [factor.to(self.dtype) for factor in factors]
        self._inverses = [torch.linalg.inv(factor.double()).to(self.dtype) for factor in factors]
        ones = torch.ones(self.dim, dtype=torch.float64, device=self.device)
        self._scales = (ones if scales is None else scales).to(self.dtype).unsqueeze(1)

    def _matmat(self, x: Tensor) -> Tensor:
        return self._along(self._scales * x, self._factors)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._scales * self._along(y, [factor.T for factor in self._factors])

    def _solve(self, x: Tensor) -> Tensor:
        return self._along(x, self._inverses) / self._scales

    def _rsolve(self, y: Tensor) -> Tensor:
        return self._along(y / self._scales, [inverse.T for inverse in self._inverses])

    def _along(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Each matrix along its dimension: the first becomes the last, until all have had their turn."""
        k = x.shape[1]
        z = x.T.reshape(k, *self._sizes)
        for factor in factors:
            z = torch.tensordot(z, factor, dims=([1], [1]))
        return z.reshape(k, self.dim).T

    def absolute(self) -> LinearOperator:
        other = copy.copy(self)
        other._factors = [factor.abs() for factor in self._factors]
        return other


def _root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    if not float(values[0]) > 0:
        raise InvalidInputError(
            f"a factor of the optimizer is not positive definite: its eigenvalues run from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g}, so its step is no P P^T. A larger matrix_eps makes it definite"
        )
    root: Tensor = (vectors * values.sqrt()) @ vectors.T
    return root
