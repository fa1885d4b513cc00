"""Which layers of a model BNP acts on while it trains."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layer_kinds import KINDS, Layer
from bnp_analysis.network.layers import changed_product, layers_of
from bnp_analysis.network.parameters import ParameterSpace, choose_parameters, clean_name

Names = str | Iterable[str]


@dataclass(frozen=True)
class Candidates:
    """The layers that can be covered, whether frozen or not, and why other parameters cannot.

    Attributes:
        layers: in the order of the modules.
        reasons: parameter name -> why it belongs to none of them.
    """

    layers: tuple[Layer, ...]
    reasons: dict[str, str]


def frozen_names(names: Names | None) -> tuple[str, ...] | None:
    """Names as a tuple, so that an iterator is read once; None for None."""
    return None if names is None else (names,) if isinstance(names, str) else tuple(names)


def refuse_replicas(model: nn.Module) -> None:
    """Refuse a model that runs in copies of its layers, which have no hooks.

    Raises:
        InvalidInputError: `DataParallel` on several devices.
    """
    if any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in model.modules()):
        raise InvalidInputError(
            "DataParallel runs copies of the layers, whose inputs BNP does not see: use DistributedDataParallel, or one"
            " device"
        )


def find_candidates(
    model: nn.Module,
    include: Names | None,
    exclude: Names | None,
    also: Iterable[type[nn.Module]] = (),
    *,
    outputs: bool = False,
) -> Candidates:
    """The layers of an unwrapped model that BNP can act on.

    Args:
        model: without its outer wrappers.
        include, exclude: names of layers or of modules above them; default all, none.
        also: types of layers that are covered only where they are asked for.
        outputs: whether the gradients at their outputs must be seen.

    Raises:
        InvalidInputError: names that match no layer, lazy layers without shapes, or nothing is left.
    """
    layers, reasons = layers_of(((clean_name(raw), module) for raw, module in model.named_modules()), also=also)
    why_not = {layer: why for layer in layers if (why := _why_not(layer, outputs=outputs))}
    for layer, why in why_not.items():
        reasons.update({name: why for name in (layer.weight, layer.bias) if name is not None})
    layers = [layer for layer in layers if layer not in why_not]
    chosen = _select(layers, include, exclude)
    for layer in layers:
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                reasons[tensor] = "left out by include= or exclude="
    for layer in chosen:
        for tensor in (layer.weight, layer.bias):
            reasons.pop(tensor or "", None)
    if not chosen:
        known = ", ".join(kind.__name__ for kind, entry in KINDS.items() if not entry.asked)
        listed = "; ".join(f"{n}: {why}" for n, why in reasons.items()) or "it has no parameters"
        raise InvalidInputError(
            f"there is nothing to precondition: no layer that BNP covers ({known}) among the parameters: {listed}"
        )
    return Candidates(tuple(chosen), reasons)


def _why_not(layer: Layer, *, outputs: bool) -> str:
    """Why a layer of a known kind cannot be covered; empty where it can."""
    if layer.kind.changes_product(layer.module):
        return changed_product(layer.module)
    dtype = layer.own_weight.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:  # torch has no means and variances of these
        return f"BNP is defined for real numbers of 16 bits and more, these are {dtype}"
    if outputs and layer.inner:
        return (
            "output_scale='estimated' needs the gradients at its outputs, which torch's recurrent kernels do not show"
        )
    return ""


def _select(layers: list[Layer], include: Names | None, exclude: Names | None) -> list[Layer]:
    wanted = layers if include is None else [layer for layer in layers if _matches(layer, _names(include, layers))]
    dropped = _names(exclude, layers) if exclude is not None else []
    return [layer for layer in wanted if not _matches(layer, dropped)]


def _names(given: Names, layers: list[Layer]) -> list[str]:
    names = [clean_name(n) for n in ([given] if isinstance(given, str) else given)]
    unknown = [n for n in names if not any(_matches(layer, [n]) for layer in layers)]
    if unknown:
        raise InvalidInputError(
            f"include= or exclude= names {', '.join(map(repr, unknown))}, which match no layer; "
            f"there are: {', '.join(layer.name for layer in layers)}"
        )
    return names


def _matches(layer: Layer, names: list[str]) -> bool:
    return any(not n or layer.name == n or layer.name.startswith(f"{n}.") for n in names)


def uncovered(
    layers: Iterable[Layer], others: Mapping[str, str], covered: Container[str], changed: Mapping[str, str]
) -> dict[str, str]:
    """Parameter name -> why it is left alone.

    Args:
        layers: the candidates.
        others: the reasons of parameters that belong to none of them.
        covered: names of the layers that are acted on.
        changed: names of layers that changed, and of parameters of new ones -> how.
    """
    layers = list(layers)
    known = {layer.name for layer in layers}
    reasons = {**others, **{name: why for name, why in changed.items() if name not in known}}
    for layer in layers:
        if layer.name not in covered:
            idle = "its forward never ran in training" if layer.trains else "its weight is frozen"
            why = changed.get(layer.name, idle)
            names = [n for n in (layer.weight, layer.bias) if n is not None]
            reasons.update(dict.fromkeys(names, f"{layer.name or type(layer.module).__name__}: {why}"))
        elif layer.bias is not None and not has_free_bias(layer):
            reasons[layer.bias] = "frozen"
    return reasons


def has_free_bias(layer: Layer) -> bool:
    """Whether the layer has a bias of its own that trains."""
    bias = layer.own_bias
    return layer.bias is not None and bias is not None and bias.requires_grad


def trainable_space(model: nn.Module) -> ParameterSpace:
    """The chart of the parameters that train, the one that a risk of this model has by default."""
    space = choose_parameters(model, None)
    shapes = {clean_name(name): shape for name, shape in space.shapes.items()}
    aliases = {clean_name(other): clean_name(name) for other, name in space.aliases.items()}
    return ParameterSpace(
        shapes, space.dtype, space.device, aliases, {clean_name(n): g for n, g in space.transposed.items()}
    )
