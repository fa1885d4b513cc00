"""How the input of a layer becomes the rows `h` that multiply its weights.

A covered layer computes `a_i = w_i . h + b_i` for every row `h`: a dense layer has one row per example (and
position), a convolution one per output position, the patch under its kernel.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.kernels import derivative
from bnp_analysis.network.observation import transformed
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.trees import tensors_of

Dense = nn.Linear
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CoveredLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
COVERED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_METHODS = {name: {getattr(kind, name, None) for kind in COVERED} for name in ("forward", "_conv_forward")}
_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Layer:
    """A covered layer of a risk, and where its tensors lie in the flat vector.

    Attributes:
        name: of the module; empty for a bare layer as root.
        module: the snapshot's module.
        weight, bias: names in the parameter space; `bias` is None without one, or when it is frozen.
        units: output units `n`.
        features: inputs of one unit, `m`; `k^d c / groups` for a convolution.
        groups: of a convolution, else 1; units and features are split evenly among them.
    """

    name: str
    module: CoveredLayer
    weight: str
    bias: str | None
    units: int
    features: int
    groups: int

    @property
    def patch(self) -> int:
        """Entries of a patch that come from one channel; 1 for a dense layer."""
        return 1 if isinstance(self.module, nn.Linear) else math.prod(self.module.kernel_size)


@dataclass(frozen=True)
class Coverage:
    """Which layers' parameters are covered, and why the others are not.

    Attributes:
        covered: the layers, in the order of the modules.
        uncovered: parameter name -> reason.
    """

    covered: tuple[Layer, ...]
    uncovered: dict[str, str]

    def __getitem__(self, name: str) -> Layer:
        for layer in self.covered:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.covered)


def coverage(risk: EmpiricalRisk) -> Coverage:
    """Find the covered layers of a risk: those whose forward runs and whose weight is free and used once.

    Args:
        risk: the empirical risk; one forward pass over its data is made.

    Returns:
        A `Coverage`; every parameter of the space is covered or named with its reason.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> from bnp_analysis.network import coverage
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (torch.ones(4, 2), torch.ones(4, 1)))
        >>> found = coverage(risk)
        >>> [layer.name for layer in found], sorted(found.uncovered)
        (['0', '2'], ['1.bias', '1.weight'])
    """
    modules = dict(risk.modules())
    owners = _owners(risk)
    runs, other = _forward_uses(risk)
    covered, reasons = [], {}
    for name, module in modules.items():
        weight = f"{name}.weight" if name else "weight"
        if not isinstance(module, COVERED) or weight not in risk.space:
            continue
        canonical = risk.space.canonical(weight)
        if name not in runs:
            reasons[canonical] = f"the forward of {name or type(module).__name__} never runs"
        elif len(owners[canonical]) > 1:
            reasons[canonical] = _tied(owners[canonical])
        elif name in other:
            reasons[canonical] = other[name]
        else:
            covered.append(_layer(name, module, canonical, risk, owners))
    taken = {name for layer in covered for name in (layer.weight, layer.bias) if name is not None}
    left = [name for name in risk.space.names if name not in taken]
    return Coverage(tuple(covered), {name: reasons.get(name) or _reason(name, owners, modules) for name in left})


def _owners(risk: EmpiricalRisk) -> dict[str, list[str]]:
    """Parameter name -> the modules that hold it; several for a tied one."""
    owners: dict[str, list[str]] = {}
    for name, module in risk.modules():
        for leaf, _ in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            if full in risk.space:
                owners.setdefault(risk.space.canonical(full), []).append(name)
    return owners


def _reason(name: str, owners: dict[str, list[str]], modules: dict[str, nn.Module]) -> str:
    held = owners.get(name, [])
    if len(held) > 1:
        return _tied(held)
    owner = modules[held[0]] if held else None
    kind = "no module" if owner is None else type(owner).__name__
    weighted = f"{kind} whose weight is frozen or not covered"
    return weighted if isinstance(owner, COVERED) else f"{kind} is not a covered layer type"


def _tied(owners: list[str]) -> str:
    return f"tied: shared by {', '.join(owners)}, whose inputs differ"


def _overridden(module: nn.Module) -> bool:
    own = any(getattr(type(module), name, None) not in known for name, known in _METHODS.items())
    return isinstance(module, COVERED) and (own or "forward" in vars(module))


def _forward_uses(risk: EmpiricalRisk) -> tuple[set[str], dict[str, str]]:
    """Whose forward runs, on any process; and why some layers are more, or less, than a product with their weight."""
    runs: set[str] = set()
    other: dict[str, str] = {}
    for own_runs, own_other in risk.group.share(lambda: _own_forward_uses(risk), "which layers run"):
        runs, other = runs | own_runs.keys(), own_other | other
    return runs, other


def _own_forward_uses(risk: EmpiricalRisk) -> tuple[dict[str, int], dict[str, str]]:
    """The same on this process's batches, and how often."""
    runs: dict[str, int] = {}
    other: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    calls = _Calls()
    stored = risk.theta.untyped_storage().data_ptr()

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        runs[name] = runs.get(name, 0) + 1
        if isinstance(module, COVERED):
            weights[name] = module.weight
            if transformed(module.weight) or module.weight.untyped_storage().data_ptr() != stored:
                other[name] = "its forward runs with other weights than its own (torch.func inside forward())"
            elif _overridden(module) and not any(h is args[0] and w is module.weight for h, w in calls.products):
                other[name] = f"{type(module).__name__} computes something else with its weight or its input"
        if not name:
            calls.products.clear()

    with calls:
        risk.capture(visit, numbers=False)
    for name, w in weights.items():
        if calls.uses_of(w) > runs[name]:
            other.setdefault(name, "its weight is also used outside of its own product")
    return runs, other


class _Calls(TorchFunctionMode):
    """The inputs and weights of products as layers compute them; how often each tensor goes into a function."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Any, Any]] = []
        # By identity, which a freed tensor hands on: the reference tells whose count it is.
        self._uses: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _FUNCTIONS:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self.products.append((named["input"], named["weight"]))
        if isinstance(out, Tensor):
            for t in tensors_of((list(args), kwargs)):
                self._uses[id(t)] = weakref.ref(t), self.uses_of(t) + 1
        return out

    def uses_of(self, t: Tensor) -> int:
        """How many functions that give a tensor were given this one."""
        reference, count = self._uses.get(id(t), (None, 0))
        return count if reference is not None and reference() is t else 0


def _layer(name: str, module: CoveredLayer, weight: str, risk: EmpiricalRisk, owners: dict[str, list[str]]) -> Layer:
    bias = f"{name}.bias" if name else "bias"
    free = module.bias is not None and owners.get(bias) == [name]
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    shape = module.weight.shape
    return Layer(name, module, weight, bias if free else None, shape[0], math.prod(shape[1:]), groups)


def rows(layer: Layer, h: Tensor) -> Tensor:
    """The rows that multiply the weights, `(R, groups, m)`.

    Dense: every leading position of `h (..., m)`. Convolution: the patch under the kernel for each output
    position of `h (N, c, ...)`, with the layer's padding, stride and dilation, in the order of the weight.
    """
    module = layer.module
    if isinstance(module, nn.Linear):
        return h.reshape(-1, 1, layer.features)
    spatial = len(module.kernel_size)
    h = _images(h, spatial)
    h = _padded(module, h)
    for d, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        span = dilation * (size - 1) + 1
        h = h.unfold(d, span, stride)[..., ::dilation]
    # (N, c, out..., k...) -> (N, out..., c, k...)
    positions = list(range(2, 2 + spatial))
    kernel = list(range(2 + spatial, 2 + 2 * spatial))
    h = h.permute(0, *positions, 1, *kernel)
    return h.reshape(-1, layer.groups, layer.features)


def example_count(layer: Layer, h: Tensor) -> int:
    """The number `N` of examples in an input `(N, ...)`, 1 for an input without that dimension."""
    single = 1 if isinstance(layer.module, nn.Linear) else len(layer.module.kernel_size) + 1
    return h.shape[0] if h.ndim > single else 1


def channels(layer: Layer, h: Tensor) -> Tensor:
    """The values of each input channel, `(samples, c)`, before padding; features for a dense layer."""
    if isinstance(layer.module, nn.Linear):
        return h.reshape(-1, layer.features)
    spatial = len(layer.module.kernel_size)
    h = _images(h, spatial)
    return h.movedim(1, -1).reshape(-1, h.shape[1])


def by_unit(layer: Layer, g: Tensor) -> Tensor:
    """A tensor in the shape of the layer's output as `(R, units)`."""
    if not isinstance(layer.module, nn.Linear):
        # Channels come before the places of an image.
        g = g.movedim(1 - layer.module.weight.ndim, -1)
    return g.reshape(-1, layer.units)


def products_only(
    layers: Iterable[Layer],
    leaves: Mapping[str, Tensor],
    outputs: Tensor,
    seen: Mapping[str, list[tuple[Tensor, Tensor]]],
) -> set[str]:
    """The layers whose weight acts on the outputs through its recorded products alone, found by a random cotangent.

    Derivatives inside `forward` use it once more: the rows that a layer sees are then not all of its work.

    Args:
        layers: covered ones.
        leaves, outputs, seen: given to, and returned by, `risk.record`.
    """
    layers = [layer for layer in layers if all(a.requires_grad for _, a in seen[layer.name])]
    if not layers:
        return set()
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(outputs)
    wanted = [leaves[layer.weight] for layer in layers] + [a for layer in layers for _, a in seen[layer.name]]
    found = iter(derivative(outputs, wanted, u, retain_graph=True, what="the derivatives by a layer's outputs"))
    wholes = [next(found) for _ in layers]
    alone = set()
    for layer, whole in zip(layers, wholes, strict=True):
        total, bound = torch.zeros_like(whole), torch.zeros_like(whole)
        for h, _ in seen[layer.name]:
            r, g = rows(layer, h), by_unit(layer, next(found))
            g = g.reshape(len(g), layer.groups, -1)
            total += torch.einsum("rgu,rgm->gum", g, r).reshape(whole.shape)
            bound += torch.einsum("rgu,rgm->gum", g.abs(), r.abs()).reshape(whole.shape)
        if bool(((whole - total).abs() <= torch.finfo(whole.dtype).eps ** 0.5 * bound).all()):
            alone.add(layer.name)
    return alone


def _images(h: Tensor, spatial: int) -> Tensor:
    """`(N, c, ...)` from one image, or from the batches of a vmap."""
    return h.reshape(-1, *h.shape[-1 - spatial :])


def expand_channels(layer: Layer, per_channel: Tensor) -> Tensor:
    """A value per input channel `(c,)` repeated over each patch, `(groups, m)`."""
    return per_channel.repeat_interleave(layer.patch).view(layer.groups, layer.features)


def output_rows(layer: Layer, output: Tensor) -> int:
    """The number `R` of rows behind an output of the layer."""
    return output.numel() // layer.units


def _padded(module: Convolution, h: Tensor) -> Tensor:
    # torch keeps the padding that F.pad needs, last dimension first, whatever form the user gave.
    reversed_padding = cast(Any, module)._reversed_padding_repeated_twice
    if not any(reversed_padding):
        return h
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(h, reversed_padding, mode=mode)


def ones_column(h: Tensor) -> Tensor:
    """`H^ = [e, H]` for rows `(R, m)`."""
    return torch.cat([h.new_ones(h.shape[0], 1), h], dim=1)
