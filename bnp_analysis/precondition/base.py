"""Preconditioners of a network's parameters, block by block."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.preconditioner import IdentityPreconditioner, Preconditioner
from bnp_analysis.network.layer_kinds import KINDS, Layer
from bnp_analysis.network.layers import Coverage, coverage
from bnp_analysis.network.parameters import Block, ParameterSpace
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.kinds import require_kind

Entry = tuple[Tensor, Preconditioner]


class NetworkPreconditioner(Preconditioner):
    """A preconditioner of a network's parameters, of which each layer has a block."""

    @abstractmethod
    def block(self, block: Block) -> Preconditioner:
        """The restriction of `P` to a layer, or to one output unit `(layer, i)`, in the order of the space.

        Raises:
            InvalidInputError: no such block, or `P` couples it with other parameters.
        """


class BlockDiagonal(NetworkPreconditioner):
    """`P` made of invertible blocks on disjoint index sets, the identity elsewhere.

    Args:
        dim: length of the parameter vector.
        blocks: name -> (positions, preconditioner of that many variables).
        dtype, device: of the parameter vector.
        space: the chart, which `block(name)` and `block((name, unit))` need.
        settings: what the blocks were made from.
        uncovered: parameter name -> why it is left alone.

    Raises:
        InvalidInputError: positions that overlap, lie outside or do not fit their block.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import DensePreconditioner
        >>> inner = DensePreconditioner(torch.tensor([[2.0]]))
        >>> BlockDiagonal(3, {"b": (torch.tensor([1]), inner)}, torch.float32).apply(torch.ones(3))
        tensor([1., 2., 1.])
    """

    def __init__(
        self,
        dim: int,
        blocks: Mapping[str, Entry],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        space: ParameterSpace | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        uncovered: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(dim, dtype, device)
        self.settings, self.uncovered = dict(settings or {}), dict(uncovered or {})
        self.blocks = dict(blocks)
        self._space = space
        for name, (positions, block) in self.blocks.items():
            if block.dim != positions.numel() or block.dtype != dtype:
                raise InvalidInputError(
                    f"block {name!r} acts on {block.dim} variables in {block.dtype}, its positions are "
                    f"{positions.numel()} and the whole is in {dtype}"
                )
        used = torch.cat([positions for positions, _ in self.blocks.values()]) if self.blocks else torch.arange(0)
        if bool(((used < 0) | (used >= dim)).any()):
            raise InvalidInputError(f"positions of blocks must lie in 0..{dim - 1}")
        if used.numel() != torch.unique(used).numel():
            raise InvalidInputError("blocks overlap: a parameter would be preconditioned twice")
        self._parts: list[tuple[slice | Tensor, Any]] = [
            (_as_slice(positions, self.device), block) for positions, block in self.blocks.values()
        ]

    def block(self, block: Block) -> Preconditioner:
        if self._space is None:
            raise InvalidInputError("this preconditioner was built without a parameter space; it has no layers")
        wanted = self._space.indices(block)
        place = torch.full((self.dim,), -1)
        place[wanted] = torch.arange(wanted.numel())
        parts: dict[str, Entry] = {}
        for name, (positions, inner) in self.blocks.items():
            target = place[positions.cpu()]
            inside = target >= 0
            if bool(inside.all()):
                parts[name] = (target, inner)
            elif bool(inside.any()):
                met = torch.nonzero(inside).flatten()
                part = inner.part(met)
                if part is None:
                    some = (
                        f"{met.numel()} of the {inner.dim} variables of {name!r}, which {type(inner).__name__} couples"
                    )
                    if not isinstance(block, str) and hasattr(inner, "unit"):
                        some = f"only a part of unit {block[1]} of {name!r}, whose weights P couples"
                    raise InvalidInputError(f"{block!r} meets {some}; take the whole layer")
                parts[name] = (target[inside], part)
        return BlockDiagonal(wanted.numel(), parts, self.dtype, self.device)

    def part(self, positions: Tensor) -> Preconditioner | None:
        met = torch.zeros(self.dim, dtype=torch.bool)
        met[positions.cpu()] = True
        inside = [entry for entry in self.blocks.values() if bool(met[entry[0].cpu()].any())]
        if not inside:
            return IdentityPreconditioner(positions.numel(), self.dtype, self.device)
        (where, block), *others = inside
        return None if others or not torch.equal(where.cpu(), positions.cpu()) else block

    def _each(self, x: Tensor, act: Callable[[Any, Tensor], Tensor]) -> Tensor:
        if len(self._parts) == 1 and self._parts[0][0] == slice(0, self.dim):  # no copy of the rows of a layer
            return act(self._parts[0][1], x)
        out = x.clone()
        for part, block in self._parts:
            out[part] = act(block, x[part])
        return out

    def _matmat(self, x: Tensor) -> Tensor:
        return self._each(x, lambda block, part: block._matmat(part))

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._each(y, lambda block, part: block._rmatmat(part))

    def _solve(self, x: Tensor) -> Tensor:
        return self._each(x, lambda block, part: block._solve(part))

    def _rsolve(self, y: Tensor) -> Tensor:
        return self._each(y, lambda block, part: block._rsolve(part))

    @property
    def roundings(self) -> int:
        return max((block.roundings for _, block in self._parts), default=0)

    def absolute(self) -> LinearOperator:
        other = copy.copy(self)
        # Only ever multiplied with: the blocks need not be invertible.
        other._parts = [(part, block.absolute()) for part, block in self._parts]
        return other


def _as_slice(positions: Tensor, device: torch.device) -> slice | Tensor:
    """A slice where positions are consecutive: a view in place of a gather."""
    if positions.numel() and bool((positions.diff() == 1).all()):
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions.to(device)


def covered_layers(risk: EmpiricalRisk, method: str, also: Iterable[type[nn.Module]] = ()) -> Coverage:
    """The layers that a layerwise preconditioner acts on.

    Raises:
        InvalidInputError: there is none; says why for each parameter.
    """
    layers = coverage(risk, also)
    if not layers.covered:
        known = ", ".join(kind.__name__ for kind, entry in KINDS.items() if not entry.asked)
        listed = "; ".join(f"{n}: {why}" for n, why in layers.uncovered.items())
        raise InvalidInputError(f"no layer that {method} covers ({known}) among the parameters: {listed}")
    return layers


def layer_positions(layer: Layer, space: ParameterSpace) -> Tensor:
    """Flat positions of a layer's weights, unit after unit, and then of its free bias."""
    names = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
    weight, *bias = (torch.arange(space.slice_of(n).start, space.slice_of(n).stop) for n in names)
    return torch.cat([layer.matrix(weight.view(layer.own_weight.shape)).reshape(-1), *bias])


def identity_preconditioner(over: EmpiricalRisk | ParameterSpace) -> BlockDiagonal:
    """`P = I` over the parameters of a risk.

    Args:
        over: the risk, or its parameter space.

    Returns:
        A preconditioner without blocks, `block(...)` included.

    Example:
        >>> from bnp_analysis.network import ParameterSpace
        >>> identity_preconditioner(ParameterSpace({"w": (2,)})).dim
        2
    """
    require_kind(over, "over", EmpiricalRisk, ParameterSpace)
    space = over.space if isinstance(over, EmpiricalRisk) else over
    return BlockDiagonal(space.dim, {}, space.dtype, space.device, space)
