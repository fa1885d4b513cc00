"""How well conditioned the inputs of a layer are: raw, centred, normalized (T7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.network.layers import Coverage, rows
from bnp_analysis.network.moments import Moments
from bnp_analysis.network.risk import EmpiricalRisk


@dataclass(frozen=True)
class InputTriangles:
    """Triangular factors, per group, with the singular values of the three forms of a layer's inputs.

    Constant features are set aside first: they are collinear with the bias column, and centring would hide it
    (trap 9). Attributes are lists over groups of `(k, k)` float64 matrices.
    """

    raw: list[Tensor]
    centered: list[Tensor]
    normalized: list[Tensor]


def input_triangles(risk: EmpiricalRisk, moments: dict[str, Moments], layers: Coverage) -> dict[str, InputTriangles]:
    """QR triangles of `H^ = [e, H]`, `H^U = [e, H - e mu^T]` and `G^ = [e, (H - e mu^T)/sigma]` for every layer.

    Each is formed directly and streamed over batches, so the rows of a convolution are never held at once.
    Layers without a free bias keep the column `e`: the inputs are judged, not the parameters.

    Args:
        risk: the empirical risk.
        moments: exact means and variances, from `layer_moments`.
        layers: the covered layers.

    Returns:
        Layer name -> `InputTriangles`.

    Source: T7, T13.
    """
    parts = risk.group.share(lambda: _own_triangles(risk, moments, layers), "the triangles of layers' inputs")
    return {layer.name: _joined([part[layer.name] for part in parts], risk.space.device) for layer in layers}


def _joined(parts: list[list[list[Tensor]]], device: torch.device) -> InputTriangles:
    """The triangles of all rows from those of several pieces; none where a piece has no row."""
    forms: tuple[list[Tensor], ...] = ([], [], [])
    for groups in zip(*parts, strict=True):
        for form, found in enumerate(forms):
            pieces = [triangles[form].to(device) for triangles in groups if triangles]
            found.append(pieces[0] if len(pieces) == 1 else torch.linalg.qr(torch.cat(pieces), mode="r")[1])
    return InputTriangles(*forms)


def _own_triangles(risk: EmpiricalRisk, moments: dict[str, Moments], layers: Coverage) -> dict[str, list[list[Tensor]]]:
    """For each layer and group the three triangles of this process's rows, formed batch by batch."""
    partial: dict[str, list[list[Tensor]]] = {layer.name: [[] for _ in range(layer.groups)] for layer in layers}

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        known = moments[name]
        all_rows = rows(layers[name], args[0]).double()
        for group, triangles in enumerate(partial[name]):
            kept = ~known.constant[group]
            h = all_rows[:, group, kept]
            centered = h - known.mean[group, kept]
            normalized = centered / known.variance[group, kept].sqrt()
            e = h.new_ones(h.shape[0], 1)
            fresh = [torch.cat([e, part], dim=1) for part in (h, centered, normalized)]
            if triangles:
                fresh = [torch.cat([old, new]) for old, new in zip(triangles, fresh, strict=True)]
            triangles[:] = [torch.linalg.qr(part, mode="r")[1] for part in fresh]

    risk.capture(visit, partial)
    return {name: [[t.cpu() for t in triangles] for triangles in groups] for name, groups in partial.items()}
