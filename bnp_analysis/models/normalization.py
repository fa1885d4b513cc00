"""The normalizations of the networks, by name, and the places where they may stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bnp_analysis.errors import InvalidInputError

#: "preactivation": layer, norm, activation. "input": norm, layer, activation, for every layer.
NORM_PLACES = ("preactivation", "input")


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
        >>> module = norm.before(3, spatial=True)
        >>> type(module).__name__, module.num_features, module.affine
        ('BatchNorm2d', 3, False)
        >>> norm.after(16, spatial=True) is None
        True
    """

    name: str = "none"
    at: str = "preactivation"
    affine: bool = True
    groups: int | None = None

    def __post_init__(self) -> None:
        if self.name not in NORMS:
            raise InvalidInputError(f"unknown normalization {self.name!r}; known: {', '.join(NORMS)}")
        if self.at not in NORM_PLACES:
            raise InvalidInputError(f"unknown place norm_at={self.at!r}; known: {', '.join(NORM_PLACES)}")

    def before(self, channels: int, *, spatial: bool) -> nn.Module | None:
        """The module in front of a layer with that many input channels, or None."""
        return self._make("input", channels, spatial)

    def after(self, channels: int, *, spatial: bool) -> nn.Module | None:
        """The module behind a hidden layer with that many output channels, or None."""
        return self._make("preactivation", channels, spatial)

    def _make(self, place: str, channels: int, spatial: bool) -> nn.Module | None:
        if place != self.at:
            return None
        return NORMS[self.name](NormSite(channels, spatial, self.affine, self.groups))
