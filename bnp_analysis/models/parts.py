"""What the networks share: activations and normalizations by name, a layer with its norm, seeds, checks of sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError

#: Name to factory.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is none of those known.

    Args:
        what: it is the name of.
        name: the name.
        known: all names.

    Raises:
        InvalidInputError: listing the known names.

    Example:
        >>> check_known("activation", "relu", ACTIVATIONS)
    """
    known = list(known)
    if name not in known:
        raise InvalidInputError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def make_activation(name: str) -> nn.Module:
    """Build an activation by name.

    Args:
        name: a key of `ACTIVATIONS`.

    Returns:
        A new module without parameters.

    Raises:
        InvalidInputError: for an unknown name.

    Example:
        >>> make_activation("tanh")
        Tanh()
    """
    check_known("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


M = TypeVar("M", bound=nn.Module)


def seeded(make: Callable[[], M], seed: int, dtype: torch.dtype | None) -> M:
    """Build a module with torch's default initialization, drawn from a seed and from nothing else.

    Values are drawn on the CPU in torch's default dtype and converted afterwards, so that one seed means
    one network in every precision and on every device.

    Args:
        make: builds the module.
        seed: of the draw. The global random state is bit-identical before and after.
        dtype: of the floating-point parameters and buffers, by default torch's.

    Returns:
        The module, on the CPU, in training mode.

    Raises:
        InvalidInputError: if `dtype` is not floating point.

    Example:
        >>> layer = seeded(lambda: nn.Linear(2, 1), 0, torch.float64)
        >>> torch.equal(layer.weight, seeded(lambda: nn.Linear(2, 1), 0, torch.float64).weight)
        True
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InvalidInputError(f"dtype must be a floating-point torch.dtype, not {dtype!r}")
    # torch.manual_seed would also reseed every accelerator, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        module = make()
    return module if dtype is None else module.to(dtype)


def check_sizes(**sizes: object) -> None:
    """Refuse anything but positive integers.

    Args:
        sizes: the arguments by their names; a sequence is looked at entry by entry.

    Raises:
        InvalidInputError: naming the argument and its value.

    Example:
        >>> check_sizes(in_channels=3, widths=[4, 2])
    """
    for name, value in sizes.items():
        several = isinstance(value, Sequence)
        for size in value if isinstance(value, Sequence) else [value]:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                what = f"each of {name}" if several else name
                raise InvalidInputError(f"{what} must be a positive integer, not {size!r}")


#: "preactivation": layer, norm, activation. "input": norm, layer, activation, for every layer.
NORM_PLACES = ("preactivation", "input")


class BatchRenorm(nn.Module):
    """Batch Renormalization (Ioffe 2017): in training `(h - mu_B) / sigma_B * r + d`, in evaluation `(h - mu) / sigma`.

    `r = clip(sigma_B / sigma, 1/r_max, r_max)` and `d = clip((mu_B - mu) / sigma, -d_max, d_max)` are constants of
    the backward pass; without clipping the training pass equals the evaluation pass. `sigma_B^2` is the biased
    batch variance plus `eps`. The limits are those of BatchNorm, `r = 1` and `d = 0`, for `warmup` batches, then
    grow linearly. Statistics are per channel (dimension 1), over the batch and all further dimensions.

    Running statistics are averages over all batches until `1 / momentum` of them were seen and exponential
    averages afterwards, so that a short run is not evaluated with the values of the initialization. No value is
    read by the host.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.
        affine: whether it has a gain and a shift.
        r_max, d_max: the final limits.
        warmup: training batches without correction, at least 1: the first batch has nothing to compare with.
        ramp: training batches at which `r_max` and `d_max` are reached. Warm-up and ramp are a tenth of the
            paper's, whose runs were of 130,000 batches and more.

    Raises:
        InvalidInputError: values out of range; inputs without a channel dimension of that size; a training
            batch with one value per channel, for which every output is a constant and no gradient remains.

    Source: S. Ioffe, Batch Renormalization, NeurIPS 2017, Algorithm 1 and Section 4.

    Example:
        >>> norm = BatchRenorm(2).eval()
        >>> norm(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 500,
        ramp: tuple[int, int] = (4000, 2500),
    ) -> None:
        super().__init__()
        if not (r_max >= 1 and d_max >= 0 and warmup >= 1 and min(ramp) >= warmup and 0 < momentum <= 1 and eps > 0):
            raise InvalidInputError(
                f"r_max={r_max} >= 1, d_max={d_max} >= 0, ramp={ramp} >= warmup={warmup} >= 1, "
                f"0 < momentum={momentum} <= 1 and eps={eps} > 0 must hold"
            )
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.r_max, self.d_max, self.warmup, self.ramp = r_max, d_max, warmup, ramp
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def limits(self) -> tuple[Tensor, Tensor]:
        """The limits `r_max` and `d_max` of the next training batch, scalar tensors."""

        def reached(at: int) -> Tensor:
            # The width is 1 where the ramp has none: the limit then jumps after the warm-up.
            return ((self.num_batches_tracked - self.warmup + 1) / max(at - self.warmup, 1)).clamp(0, 1)

        return 1 + (self.r_max - 1) * reached(self.ramp[0]), self.d_max * reached(self.ramp[1])

    def forward(self, h: Tensor) -> Tensor:
        if h.ndim < 2 or h.shape[1] != self.num_features:
            raise InvalidInputError(f"expected (N, {self.num_features}, ...), not an input of shape {tuple(h.shape)}")
        shape = (1, -1, *[1] * (h.ndim - 2))
        if self.training:
            h = self._renormalized(h, shape)
        else:
            h = (h - self.running_mean.view(shape)) / self.running_std.view(shape)
        if self.weight is None or self.bias is None:
            return h
        return h * self.weight.view(shape) + self.bias.view(shape)

    def _renormalized(self, h: Tensor, shape: tuple[int, ...]) -> Tensor:
        if h.numel() == h.shape[1]:
            raise InvalidInputError(
                f"BatchRenorm in training needs more than one value per channel, got an input of shape "
                f"{tuple(h.shape)}: h - mu_B is zero, and so is the gradient of everything below. Use a larger "
                "batch, or a normalization of single examples (layer, group)"
            )
        variance, mean = torch.var_mean(h, [0, *range(2, h.ndim)], correction=0)
        std = (variance + self.eps).sqrt()
        with torch.no_grad():
            r_max, d_max = self.limits()
            r = (std / self.running_std).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
            self.num_batches_tracked += 1
            share = (1 / self.num_batches_tracked).clamp(min=self.momentum).to(mean.dtype)
            self.running_mean.lerp_(mean, share)
            self.running_std.lerp_(std, share)
        return (h - mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, r_max={self.r_max}, d_max={self.d_max}, affine={self.affine}"


@dataclass(frozen=True)
class NormSite:
    """Where a normalization stands: `channels` features, followed by two spatial dimensions or by none."""

    channels: int
    spatial: bool
    affine: bool
    groups: int | None


def _batch(site: NormSite) -> nn.Module:
    kind = nn.BatchNorm2d if site.spatial else nn.BatchNorm1d
    return kind(site.channels, affine=site.affine)


def _layer(site: NormSite) -> nn.Module:
    if site.spatial:
        return nn.GroupNorm(1, site.channels, affine=site.affine)
    _check_group_size(site.channels, 1, "layer")
    return nn.LayerNorm(site.channels, elementwise_affine=site.affine)


def _group(site: NormSite) -> nn.Module:
    groups = site.groups
    if groups is None:
        # Small groups leave little of the input: two features become +1 and -1.
        fitting = (g for g in (8, 4, 2) if site.channels % g == 0 and site.channels // g >= 4)
        groups = next(fitting, 1)
    elif groups < 1 or site.channels % groups:
        raise InvalidInputError(
            f"{groups} groups do not divide {site.channels} channels; "
            f"choose norm_groups that divides every normalized width, or None for a fitting number at each"
        )
    if not site.spatial:
        _check_group_size(site.channels, groups, "group")
    return nn.GroupNorm(groups, site.channels, affine=site.affine)


def _check_group_size(channels: int, groups: int, name: str) -> None:
    if channels == groups:
        raise InvalidInputError(
            f"norm={name!r} over groups of one feature gives zero for any input; "
            f"use wider layers, fewer norm_groups, or norm='batch'"
        )


#: Name to factory; a new normalization is added here and nowhere else. "none" inserts no module.
NORMS: dict[str, Callable[[NormSite], nn.Module | None]] = {
    "none": lambda _: None,
    "batch": _batch,
    "layer": _layer,
    "group": _group,
    "renorm": lambda site: BatchRenorm(site.channels, affine=site.affine),
}


@dataclass(frozen=True)
class Normalization:
    """The normalization of a whole network.

    Args:
        name: a key of `NORMS`. Layer normalization of images is over channels and space of one example,
            `GroupNorm(1, C)`.
        at: "preactivation" (layer, norm, activation; none after the last layer) or "input" (norm before
            every linear or convolutional layer, the first and the last included).
        affine: whether it has a gain and a shift of its own.
        groups: of "group"; None takes the largest of 8, 4, 2 that leaves groups of at least 4, else 1.

    Raises:
        InvalidInputError: for an unknown name or place.

    Example:
        >>> norm = Normalization("batch", at="input", affine=False)
        >>> module = norm.at_place("input", 3, spatial=True)
        >>> type(module).__name__, module.num_features, module.affine
        ('BatchNorm2d', 3, False)
        >>> norm.at_place("preactivation", 16, spatial=True) is None
        True
    """

    name: str = "none"
    at: str = "preactivation"
    affine: bool = True
    groups: int | None = None

    def __post_init__(self) -> None:
        check_known("normalization", self.name, NORMS)
        check_known("norm_at", self.at, NORM_PLACES)

    def at_place(self, place: str, channels: int, *, spatial: bool) -> nn.Module | None:
        """The module for `channels` features where the normalization stands at this place, else None."""
        return NORMS[self.name](NormSite(channels, spatial, self.affine, self.groups)) if place == self.at else None


def add_layer(
    modules: OrderedDict[str, nn.Module],
    suffix: str,
    layer: nn.Linear | nn.Conv2d,
    *,
    norm: Normalization,
    activation: str | None = None,
    output: bool = False,
) -> None:
    """Append a layer with the normalization that belongs to it, and its activation.

    Args:
        modules: the network so far; gets `fc<suffix>` or `conv<suffix>`, `norm<suffix>`, `act<suffix>`.
        suffix: the number of the layer, or nothing.
        layer: the layer.
        norm: what to normalize, and where.
        activation: a key of `ACTIVATIONS`, or None.
        output: whether it is the last layer, behind which nothing is normalized.

    Example:
        >>> modules = OrderedDict()
        >>> add_layer(modules, "1", nn.Linear(2, 3), norm=Normalization("batch"), activation="relu")
        >>> list(modules)
        ['fc1', 'norm1', 'act1']
    """
    # The two kinds that networks are built of here; `models` knows nothing of the registry, which is above it.
    if isinstance(layer, nn.Conv2d):
        kind, spatial, inputs, outputs = "conv", True, layer.in_channels, layer.out_channels
    else:
        kind, spatial, inputs, outputs = "fc", False, layer.in_features, layer.out_features
    if (before := norm.at_place("input", inputs, spatial=spatial)) is not None:
        modules[f"norm{suffix}"] = before
    modules[f"{kind}{suffix}"] = layer
    after = None if output else norm.at_place("preactivation", outputs, spatial=spatial)
    if after is not None:
        modules[f"norm{suffix}"] = after
    if activation is not None:
        modules[f"act{suffix}"] = make_activation(activation)
