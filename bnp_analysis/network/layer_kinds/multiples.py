"""Weights that are a parameter times fixed numbers, entry by entry: pruned ones, masks and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnp_analysis.network.recorded_product import Recording

_TIMES = ("mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "divide")


def where_stored(module: nn.Module, weight: str) -> tuple[str, str]:
    """Where the parameter behind a weight is, and where the numbers are that it is multiplied by; the latter may be "".

    `torch.nn.utils.prune` keeps `weight_orig` and `weight_mask`, `torch.nn.utils.parametrize` the parameter in
    `parametrizations.weight.original`, which counts if all that is done to it is to multiply it by fixed numbers.

    Example:
        >>> from torch.nn.utils import prune
        >>> where_stored(prune.random_unstructured(nn.Linear(3, 2), "weight", 0.5), "weight")
        ('weight_orig', 'weight_mask')
    """
    pruned, mask = f"{weight}_orig", f"{weight}_mask"
    if pruned in module._parameters and mask in module._buffers:
        return pruned, mask
    if parametrize.is_parametrized(module, weight) and not (why_not_fixed(module, weight)):
        return f"parametrizations.{weight}.original", f"parametrizations.{weight}"
    return weight, ""


def why_not_fixed(module: nn.Module, weight: str) -> str:
    """The parametrization that is no multiplication by fixed numbers, by its name; empty if there is none."""
    chain: Any = module.parametrizations
    chain = chain[weight]
    if not hasattr(chain, "original"):
        return ", ".join(type(one).__name__ for one in chain)
    at = chain.original.detach()
    for one in chain:
        if next(one.parameters(), None) is not None or not _multiplies(one, at):
            return type(one).__name__
    return ""


@torch.no_grad()
def _multiplies(parametrization: nn.Module, at: Tensor) -> bool:
    """Whether all that it calls are products of its argument with tensors or numbers that it holds."""
    with Recording() as recorded:
        made = parametrization(at)
    return recorded.is_multiple(made, at, _TIMES)


@torch.no_grad()
def multiplier(module: nn.Module, gain: str, like: Tensor) -> Tensor:
    """The fixed numbers, in the shape of the parameter."""
    if not gain.startswith("parametrizations."):
        mask: Tensor = getattr(module, gain)
        return mask.to(like)
    made = torch.ones_like(like)
    chain: Any = module.get_submodule(gain)
    for one in chain:
        made = one(made)
    return made
