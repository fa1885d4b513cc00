"""Candidate null directions as columns on few coordinates, their causes, and the finite symmetries behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.symmetry.graph import Graph


class Cause(StrEnum):
    """Why a direction is null (T11); printed and written to files as these words."""

    NO_EFFECT = "parameters without effect"
    DEPENDENT_INPUTS = "dependent inputs"
    INACTIVE_ROWS = "inactive rows"
    DEAD_UNITS = "dead units"
    UNREAD_OUTPUTS = "unread outputs"
    SOFTMAX_SHIFT = "softmax shift"
    LAYER_NORM_SHIFT = "layer_norm shift"
    GROUP_NORM_SHIFT = "group_norm shift"
    BATCH_NORM_SHIFT = "batch_norm shift"
    INSTANCE_NORM_SHIFT = "instance_norm shift"
    LAYER_NORM_SCALE = "layer_norm scale"
    RMS_NORM_SCALE = "rms_norm scale"
    GROUP_NORM_SCALE = "group_norm scale"
    BATCH_NORM_SCALE = "batch_norm scale"
    INSTANCE_NORM_SCALE = "instance_norm scale"
    COMPENSATED_SCALE = "batch_norm scale made up for"
    NORM_AFFINE = "norm affine"
    ROTATION = "rotation through norms"
    HOMOGENEITY = "homogeneity"
    ALWAYS_ACTIVE = "always-active units"
    LINEAR_LAYER = "linear layer"
    RESIDUAL_STREAM = "residual stream"
    QUERY_KEY = "attention query-key"
    KEY_BIAS = "key bias"
    ATTENTION_VALUES = "attention values"

    def __repr__(self) -> str:
        return repr(self.value)


# What a normalization, or a softmax, makes of a common shift of what it receives: nothing.
SHIFTS = {
    "layer_norm": Cause.LAYER_NORM_SHIFT,
    "group_norm": Cause.GROUP_NORM_SHIFT,
    "batch_norm": Cause.BATCH_NORM_SHIFT,
    "instance_norm": Cause.INSTANCE_NORM_SHIFT,
    "softmax": Cause.SOFTMAX_SHIFT,
    "log_softmax": Cause.SOFTMAX_SHIFT,
}
# The same of a common scale.
SCALES = {
    "layer_norm": Cause.LAYER_NORM_SCALE,
    "rms_norm": Cause.RMS_NORM_SCALE,
    "group_norm": Cause.GROUP_NORM_SCALE,
    "batch_norm": Cause.BATCH_NORM_SCALE,
    "instance_norm": Cause.INSTANCE_NORM_SCALE,
}


@dataclass(frozen=True, eq=False)
class Part:
    """Columns `values (p, k)` on the flat positions `positions (p,)`, zero elsewhere; on the CPU, in float64."""

    positions: Tensor
    values: Tensor

    @property
    def count(self) -> int:
        return self.values.shape[1]


def _no_positions() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


def _no_values() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Orbit:
    """A one-parameter group `T_t`, `T_s T_t = T_(s t)`, with `L(T_t theta) = L(theta)` for all `t > 0`.

    Scales multiply by powers of `t`, shifts and mixings of one channel into another go by `log t`.

    Attributes:
        cause: what the symmetry comes from, as in `NullDirections.sources`.
        scaled, exponents: `theta[scaled] *= t^exponents`.
        shifted, steps: `theta[shifted] += log(t) steps`.
        sheared: for each of some steps in a row, `theta[target] += log(t) * factor * theta[source]`, summed over equal
            targets; columns `(target, source)` and the factors.

    Source: T11, T12.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(9, 3, dtype=torch.float64), torch.arange(9) % 2
        >>> model = bnp.models.mlp([3, 4, 2], dtype=torch.float64)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
        >>> orbit = bnp.null_directions(risk).orbit("homogeneity")
        >>> bool(abs(risk(orbit.apply(risk.theta, 50.0)) - risk.value) < 1e-14)
        True
    """

    cause: str
    scaled: Tensor = field(default_factory=_no_positions)
    exponents: Tensor = field(default_factory=_no_values)
    shifted: Tensor = field(default_factory=_no_positions)
    steps: Tensor = field(default_factory=_no_values)
    sheared: tuple[tuple[Tensor, Tensor], ...] = ()

    def apply(self, theta: Tensor, t: float) -> Tensor:
        """`T_t theta`.

        Args:
            theta: flat parameters `(n,)`, near or far from where the symmetry was found.
            t: positive; 1 is the identity.

        Raises:
            InvalidInputError: `t` is not positive.
        """
        if not (t > 0 and math.isfinite(t)):
            raise InvalidInputError(f"an orbit goes along 0 < t < inf, not t = {t}; t = 1 is where it starts")
        time, out = math.log(t), theta.clone()
        out[self.scaled] *= (time * self.exponents).exp().to(theta)
        out[self.shifted] += (time * self.steps).to(theta)
        for pairs, factors in self.sheared:
            out = out.index_add(0, pairs[:, 0], (time * factors).to(theta) * out[pairs[:, 1]])
        return out

    def tangent(self, theta: Tensor) -> Tensor:
        """`d/dt T_t theta` at `t = 1`, `(n,)`."""
        out = torch.zeros_like(theta)
        out[self.scaled] = self.exponents.to(theta) * theta[self.scaled]
        out[self.shifted] += self.steps.to(theta)
        for pairs, factors in self.sheared:
            out = out.index_add(0, pairs[:, 0], factors.to(theta) * theta[pairs[:, 1]])
        return out


@dataclass(frozen=True, eq=False)
class Candidate:
    """Directions of one cause; `exact` is False where only a norm's eps = 0 would make them null.

    `orbits[i]` is the finite symmetry along the single column of `parts[i]`, where there is one.
    """

    cause: str
    parts: tuple[Part, ...]
    exact: bool = True
    orbits: tuple[Orbit | None, ...] = ()

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)


class Chart:
    """Where the parameters of a graph lie in the flat space, and their values in float64 on the CPU.

    Attributes:
        values: all numbers by position: the free ones as in the flat space, then the constants.
    """

    def __init__(self, risk: EmpiricalRisk, graph: Graph) -> None:
        self.space, self.graph, self.dim = risk.space, graph, risk.space.dim
        self._tensors = {name: t.detach().cpu().double() for name, t in risk.named_tensors().items()}
        self._positions, self._movable = dict[str, Tensor](), dict[str, bool]()
        self._start, begin = {}, self.dim
        for name, t in self._tensors.items():
            free = name in self.space
            self._start[name] = self.space.slice_of(name).start if free else begin
            begin += 0 if free else t.numel()
        self.values = torch.zeros(begin, dtype=torch.float64)
        for name, t in self._tensors.items():
            self.values[self.positions(name).reshape(-1)] = t.reshape(-1)

    @property
    def names(self) -> list[str]:
        """Of all parameters, free or not."""
        return [*self._tensors]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def positions(self, name: str) -> Tensor:
        """Where the entries of a parameter lie, of its shape; constants lie behind the flat space."""
        start, t = self._start[name], self._tensors[name]
        if name not in self._positions:
            self._positions[name] = torch.arange(start, start + t.numel()).view(t.shape)
        return self._positions[name]

    def movable(self, name: str) -> bool:
        """Whether a parameter is free and used once."""
        if name not in self._movable:
            self._movable[name] = name in self.space and self.graph.uses(name) == 1
        return self._movable[name]

    def part(self, pieces: Iterable[tuple[str, Tensor, Tensor]]) -> Part | None:
        """Columns on several tensors `(name, positions, values)` as one part; None if one that is not movable moves."""
        moving = [piece for piece in pieces if bool(piece[2].any())]
        if not moving or not all(self.movable(name) for name, _, _ in moving):
            return None
        return Part(torch.cat([where for _, where, _ in moving]), torch.cat([values for _, _, values in moving]))
