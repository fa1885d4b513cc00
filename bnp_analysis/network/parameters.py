"""The map between a model's named tensors and flat vectors: free parameters, names without wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layer_kinds.base import transposed_weights
from bnp_analysis.runtime.kinds import KINDS

_WRAPPERS = frozenset({"module", "_orig_mod"})


def clean_name(name: str) -> str:
    """A name without the segments that compiled and data-parallel wrappers add, wherever they stand.

    Example:
        >>> clean_name("module._orig_mod.body.module.fc.weight")
        'body.fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class NameIndex:
    """Finds a model's tensor under the name that a wrapped, or an unwrapped, copy of the model gives it.

    A model may itself have a part called `module` (averaged models do): an exact match comes first.

    Example:
        >>> NameIndex(["module.fc.weight"]).find("fc.weight")
        'module.fc.weight'
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._known = set(self.names)
        self._cleaned: dict[str, str | None] = {}
        for name in self.names:
            key = clean_name(name)
            # None marks a name that two tensors would answer to.
            self._cleaned[key] = name if key not in self._cleaned else None

    def find(self, name: str) -> str | None:
        """The model's own name, or None where no tensor, or more than one, answers."""
        return name if name in self._known else self._cleaned.get(clean_name(name))

    def under(self, prefix: str) -> list[str]:
        """The names that are the prefix, or lie below it."""
        exact = [name for name in self.names if _below(name, prefix)]
        return exact or [name for name in self.names if _below(clean_name(name), clean_name(prefix))]


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


#: A layer, module, tensor or pattern of names (`"*.weight"`); with an output unit of it, or a range of its units.
Block = str | tuple[str, int | slice]


class ParameterSpace:
    """The flat coordinates of a set of named tensors: their order, each row-major.

    Args:
        shapes: name -> shape, in the order of `named_parameters()`.
        dtype, device: of every flat vector.
        aliases: other names of the same tensors (tied parameters) -> the name in `shapes`.
        transposed: name -> groups of weights whose output units are their columns, or in a transposed convolution their
            second dimension; of all others they are the rows.

    Example:
        >>> space = ParameterSpace({"weight": (2, 3), "bias": (2,)})
        >>> space.dim, space.indices(("", 1)).tolist()
        (8, [3, 4, 5, 7])
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        aliases: Mapping[str, str] | None = None,
        transposed: Mapping[str, int] | None = None,
    ) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.names = tuple(self.shapes)
        self.dtype, self.device = dtype, torch.device(device)
        self.aliases = {other: name for other, name in (aliases or {}).items() if name in self.shapes}
        self.transposed = {name: groups for name, groups in (transposed or {}).items() if name in self.shapes}
        self._slices: dict[str, slice] = {}
        begin = 0
        for name, shape in self.shapes.items():
            self._slices[name] = slice(begin, begin + shape.numel())
            begin += shape.numel()
        self.dim = begin

    def slice_of(self, name: str) -> slice:
        """Where a named tensor lies in the flat vector."""
        return self._slices[self.canonical(name)]

    def canonical(self, name: str) -> str:
        """The name under which a tensor is listed; tied parameters have several.

        Raises:
            InvalidInputError: no such tensor here.
        """
        listed = self.aliases.get(name, name)
        if listed not in self._slices:
            raise InvalidInputError(f"no parameter {name!r} here; there are: {', '.join(self.names)}")
        return listed

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self._slices

    def flatten(self, tensors: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
        """The flat vector `(n,)` of one tensor per name (a mapping, or a sequence in the order of `names`)."""
        if isinstance(tensors, Mapping):
            missing = [name for name in self.names if name not in tensors]
            if missing:
                raise InvalidInputError(f"tensors are missing: {', '.join(missing)}")
            parts = [tensors[name] for name in self.names]
        else:
            parts = list(tensors)
            if len(parts) != len(self.names) or not all(isinstance(part, Tensor) for part in parts):
                raise InvalidInputError(f"{len(self.names)} tensors are needed, for {', '.join(self.names)}")
        for name, part in zip(self.names, parts, strict=True):
            if part.shape != self.shapes[name]:
                raise InvalidInputError(
                    f"{name} has shape {tuple(part.shape)}, expected {tuple(self.shapes[name])}; "
                    "it comes from another architecture"
                )
        return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(0, dtype=self.dtype)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector `(n,)` under the names."""
        if theta.shape != (self.dim,):
            raise InvalidInputError(f"a flat vector of shape ({self.dim},) is needed, got {tuple(theta.shape)}")
        return {
            name: theta.narrow(0, self._slices[name].start, shape.numel()).view(shape)
            for name, shape in self.shapes.items()
        }

    def layer_names(self, layer: str) -> tuple[str, ...]:
        """The tensors of a layer, of every layer below a module, of one parameter name, or of a pattern of names.

        Args:
            layer: a name, `""` for all; with `*`, `?` or `[...]` in it a pattern that whole names match, or the names
                of modules above them: `"*.weight"`, `"blocks.[01].*"`, `"*.attention"`.

        Raises:
            InvalidInputError: nothing matches; lists what there is.
        """
        prefix = f"{layer}." if layer else ""
        every = list(self.names) + list(self.aliases)
        found = {self.canonical(name) for name in every if name == layer or name.startswith(prefix)}
        if not found and any(sign in layer for sign in "*?["):
            patterns = (layer, f"{layer}.*")
            found = {self.canonical(name) for name in every if any(fnmatchcase(name, p) for p in patterns)}
        if not found:
            raise InvalidInputError(f"block: no parameter belongs to {layer!r}; there are: {', '.join(self.names)}")
        return tuple(name for name in self.names if name in found)

    def indices(self, block: Block) -> Tensor:
        """Flat positions of a block: of a layer or pattern, or of output units of it, their rows of every tensor.

        Args:
            block: as for `layer_names`; `(layer, i)` for output unit `i`, whose row (column, where the weight is
                stored transposed) of every tensor is taken; `(layer, slice(a, b))` for the units `a .. b - 1`, as the
                queries of a packed `in_proj_weight`.

        Raises:
            InvalidInputError: no such layer or unit.
        """
        fits, words = KINDS["Block"]
        if not fits(block):
            raise InvalidInputError(f"block must be {words}, not {block!r:.60}")
        layer, unit = (block, None) if isinstance(block, str) else block
        if isinstance(unit, slice) and (unit.start is None or unit.stop is None or unit.step not in (None, 1)):
            raise InvalidInputError(f"a range of output units is slice(begin, end), got {unit}")
        parts = []
        for name in self.layer_names(layer):
            shape, begin = self.shapes[name], self._slices[name].start
            grid = torch.arange(begin, begin + shape.numel())
            if unit is not None:
                grid = grid.view(shape)
                if (groups := self.transposed.get(name)) is not None:
                    grid = grid.view(groups, -1, *shape[1:]).transpose(1, 2).flatten(0, 1)
                if isinstance(unit, slice):
                    first, last, words = unit.start, unit.stop - 1, f"units {unit.start} to {unit.stop - 1}"
                else:
                    first, last, words = unit, unit, f"unit {unit}"
                if len(shape) == 0 or not 0 <= first <= last < len(grid):
                    raise InvalidInputError(
                        f"block: {layer!r} has no output {words}: its parameter {name!r} has shape {tuple(shape)}"
                    )
                grid = grid[unit].reshape(-1)
            parts.append(grid)
        return torch.cat(parts)

    def restrict(self, names: Iterable[str]) -> ParameterSpace:
        """The space of some of the tensors, in the order of this one."""
        wanted = {self.canonical(name) for name in names}
        kept = {name: shape for name, shape in self.shapes.items() if name in wanted}
        return ParameterSpace(kept, self.dtype, self.device, self.aliases, self.transposed)

    def row_blocks(self, layer: str, parts: int | Sequence[str]) -> dict[str, Block]:
        """The output units of a layer or pattern in equal parts: queries, keys and values, or heads.

        Args:
            layer: as for `layer_names`; all of its tensors have as many rows.
            parts: their names in order, or how many.

        Returns:
            `layer[part]` -> block.

        Raises:
            InvalidInputError: the rows do not divide into as many parts.

        Example:
            >>> space = ParameterSpace({"in_proj_weight": (6, 2), "in_proj_bias": (6,)})
            >>> space.row_blocks("in_proj_*", "qkv")["in_proj_*[k]"]
            ('in_proj_*', slice(2, 4, None))
        """
        names = [str(i) for i in range(parts)] if isinstance(parts, int) else list(parts)
        rows = {self._rows(name) for name in self.layer_names(layer)}
        if len(rows) > 1 or not names or not min(rows) or min(rows) % len(names):
            raise InvalidInputError(
                f"the tensors of {layer!r} have {' and '.join(map(str, sorted(rows)))} rows, which do not divide into "
                f"{len(names)} equal parts; give blocks as (name, slice(begin, end))"
            )
        width = min(rows) // len(names)
        return {f"{layer}[{part}]": (layer, slice(i * width, (i + 1) * width)) for i, part in enumerate(names)}

    def _rows(self, name: str) -> int:
        shape = self.shapes[name]
        if not shape:
            return 0
        return shape[1] * self.transposed[name] if name in self.transposed else shape[0]

    def __repr__(self) -> str:
        return f"<ParameterSpace {self.dim} in {len(self.names)} tensors, {self.dtype} on {self.device}>"


def choose_parameters(
    model: nn.Module, params: Iterable[str] | Callable[[str, nn.Parameter], bool] | None
) -> ParameterSpace:
    """The free parameters of a snapshot, chosen by `params=`."""
    named = dict(model.named_parameters())
    canonical = {id(p): n for n, p in named.items()}
    aliases = {n: canonical[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if n != canonical[id(p)]}
    if params is None:
        chosen = [n for n, p in named.items() if p.requires_grad]
        why = "none requires a gradient; freeze fewer, or name them with params="
    elif callable(params):
        chosen = [n for n, p in named.items() if params(n, p)]
        why = "the filter params= matches none"
    else:
        prefixes = [params] if isinstance(params, str) else list(params)
        index = NameIndex((*named, *aliases))
        matches = {q: index.under(q) for q in prefixes}
        unmatched = [q for q, found in matches.items() if not found]
        if unmatched:
            raise InvalidInputError(
                f"params= names {', '.join(map(repr, unmatched))}, which match no parameter; "
                f"there are: {', '.join(named)}"
            )
        hit = {aliases.get(n, n) for found in matches.values() for n in found}
        chosen = [n for n in named if n in hit]
        why = "params= is empty"
    if not chosen:
        raise InvalidInputError(
            f"there is no parameter to differentiate: {why}. There are: {', '.join(named) or 'none'}"
        )
    bad = [n for n in chosen if not named[n].is_floating_point()]
    if bad:
        kinds = ", ".join(f"{n} ({named[n].dtype})" for n in bad)
        raise InvalidInputError(
            f"parameters that are not real floating point have no derivative: {kinds}; leave them out with params="
        )
    first = named[chosen[0]]
    mixed = {named[n].dtype for n in chosen}
    if len(mixed) > 1:
        raise InvalidInputError(f"parameters of several dtypes: {mixed}; choose with dtype=")
    return ParameterSpace(
        {n: named[n].shape for n in chosen}, first.dtype, first.device, aliases, transposed_weights(model)
    )  # fmt: skip
