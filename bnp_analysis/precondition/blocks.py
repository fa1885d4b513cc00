"""Preconditioners that act on parts of the parameter vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.preconditioner import IdentityPreconditioner, Preconditioner
from bnp_analysis.network.parameters import Block, ParameterSpace

Entry = tuple[Tensor, Preconditioner]


class BlockDiagonal(Preconditioner):
    """`P` made of invertible blocks on disjoint index sets, the identity elsewhere.

    Args:
        dim: length of the parameter vector.
        blocks: name -> (positions, preconditioner of that many variables).
        space: the chart, which `block(name)` and `block((name, unit))` need.

    Raises:
        InvalidInputError: positions that overlap or do not fit their block.

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
    ) -> None:
        super().__init__(dim, dtype, device)
        self.blocks = dict(blocks)
        self._space = space
        used = torch.cat([positions for positions, _ in self.blocks.values()]) if self.blocks else torch.zeros(0)
        if used.numel() != len(set(used.tolist())):
            raise InvalidInputError("blocks overlap: a parameter would be preconditioned twice")
        for name, (positions, block) in self.blocks.items():
            if block.dim != positions.numel() or block.dtype != dtype:
                raise InvalidInputError(
                    f"block {name!r} acts on {block.dim} variables in {block.dtype}, its positions are "
                    f"{positions.numel()} and the whole is in {dtype}"
                )
        self._parts = [(_as_slice(positions, self.device), block) for positions, block in self.blocks.values()]

    def block(self, block: Block) -> Preconditioner:
        """The restriction of `P` to a layer, or to one output unit `(layer, i)`, in the order of the space.

        Raises:
            InvalidInputError: the positions meet only a part of a block that does not split there.
        """
        if self._space is None:
            raise InvalidInputError("this preconditioner was built without a parameter space; it has no layers")
        wanted = self._space.indices(block)
        if not isinstance(block, str) and block[0] in self.blocks:
            inner = self.blocks[block[0]][1]
            if not isinstance(inner, SplitsByUnit):
                raise InvalidInputError(f"{type(inner).__name__} couples the units of {block[0]!r}")
            return inner.unit(block[1])
        place = {int(p): i for i, p in enumerate(wanted)}
        inside = {}
        for name, (positions, inner) in self.blocks.items():
            meets = [int(p) in place for p in positions]
            if all(meets) and meets:
                inside[name] = (torch.tensor([place[int(p)] for p in positions]), inner)
            elif any(meets):
                raise InvalidInputError(f"{block!r} meets only a part of the block {name!r}")
        return BlockDiagonal(wanted.numel(), inside, self.dtype, self.device)

    def _each(self, x: Tensor, act: Callable[[Preconditioner, Tensor], Tensor]) -> Tensor:
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

    def absolute(self) -> LinearOperator:
        return _BlockDiagonalMagnitude(self)


class SplitsByUnit(Preconditioner):
    """A layer's preconditioner that acts on each output unit by itself."""

    def unit(self, i: int) -> Preconditioner:
        """The preconditioner of output unit `i` in the order (weights of the unit, its bias)."""
        raise TypeError(f"{type(self).__name__} must define unit()")


class _BlockDiagonalMagnitude(LinearOperator):
    """`|P|` block by block."""

    def __init__(self, P: BlockDiagonal) -> None:
        super().__init__(P.shape, P.dtype, P.device)
        self._parts = [(part, block.absolute()) for part, block in P._parts]

    def _matmat(self, x: Tensor) -> Tensor:
        out = x.clone()
        for part, block in self._parts:
            out[part] = block._matmat(x[part])
        return out

    def _rmatmat(self, y: Tensor) -> Tensor:
        out = y.clone()
        for part, block in self._parts:
            out[part] = block._rmatmat(y[part])
        return out


def _as_slice(positions: Tensor, device: torch.device) -> slice | Tensor:
    """A slice where positions are consecutive: a view in place of a gather."""
    if positions.numel() and bool((positions.diff() == 1).all()):
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions.to(device)


def identity_preconditioner(space: ParameterSpace) -> IdentityPreconditioner:
    """`P = I` over a parameter space.

    Args:
        space: the chart of the parameters.

    Returns:
        An `IdentityPreconditioner`.

    Example:
        >>> from bnp_analysis.network import ParameterSpace
        >>> identity_preconditioner(ParameterSpace({"w": (2,)})).dim
        2
    """
    return IdentityPreconditioner(space.dim, space.dtype, space.device)
