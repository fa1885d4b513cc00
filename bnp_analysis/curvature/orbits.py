"""Finite symmetries: maps of the parameters that leave the risk as it is, however far they go."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.candidates import Move


@dataclass(frozen=True, eq=False)
class Orbit:
    """A one-parameter group `T_t`, `T_s T_t = T_(s t)`, with `L(T_t theta) = L(theta)` for all `t > 0`.

    Scales multiply by powers of `t`, shifts and mixings of one channel into another go by `log t`.

    Attributes:
        cause: what the symmetry comes from, as in `NullDirections.sources`.

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
    _move: Move

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
        move, time, out = self._move, math.log(t), theta.clone()
        out[move.scaled] *= (time * move.exponents).exp().to(theta)
        out[move.moved] += (time * move.steps).to(theta)
        for pairs, factors in move.sheared:
            out = out.index_add(0, pairs[:, 0], (time * factors).to(theta) * out[pairs[:, 1]])
        return out

    def tangent(self, theta: Tensor) -> Tensor:
        """`d/dt T_t theta` at `t = 1`, `(n,)`."""
        move, out = self._move, torch.zeros_like(theta)
        out[move.scaled] = move.exponents.to(theta) * theta[move.scaled]
        out[move.moved] += move.steps.to(theta)
        for pairs, factors in move.sheared:
            out = out.index_add(0, pairs[:, 0], factors.to(theta) * theta[pairs[:, 1]])
        return out
