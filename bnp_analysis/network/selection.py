"""Which of a model's parameters are free."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layer_kinds.base import transposed_weights
from bnp_analysis.network.names import NameIndex
from bnp_analysis.network.parameters import ParameterSpace


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
