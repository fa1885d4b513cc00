"""Running statistics as a state dict, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.names import clean_name
from bnp_analysis.training.bnp.output_scale import OutputScales
from bnp_analysis.training.bnp.running_moments import RunningMoments

_VERSION = 1


def write_state(running: RunningMoments, q2: Mapping[int, float], outputs: OutputScales | None) -> dict[str, Any]:
    """Tensors and numbers only, so that `torch.load(weights_only=True)` reads it."""
    layers: dict[str, dict[str, Any]] = {}
    for i, (name, width) in enumerate(zip(running.names, running.widths, strict=True)):
        mean, variance = (torch.zeros(width), torch.ones(width)) if running.now is None else running.of(i)
        layers[name] = {
            "mean": mean.clone(),
            "variance": variance.clone(),
            "rows": running.rows[i],
            "examples": running.examples[i],
            "start": running.start[i],
            "q2": q2.get(i, 1.0),
        }
        if outputs is not None:
            layers[name] |= outputs.state(i)
    return {"version": _VERSION, "step": running.step, "layers": layers}


def read_state(state: Mapping[str, Any], running: RunningMoments, outputs: OutputScales | None) -> dict[int, float]:
    """Put a state into the running statistics; nothing changes unless all of it fits.

    Returns:
        `q^2` of the layers seen.

    Raises:
        InvalidInputError: no such state, other layers, or other widths.
    """
    if not isinstance(state, Mapping) or not {"step", "layers"} <= state.keys() or state.get("version") != _VERSION:
        raise InvalidInputError(f"this is no state of BNP, version {_VERSION}")
    layers = {clean_name(name): entry for name, entry in state["layers"].items()}
    misfit = [f"missing: {n}" for n in running.names if n not in layers]
    misfit += [f"unknown: {n}" for n in layers if n not in running.names]
    for name, width in zip(running.names, running.widths, strict=True):
        if name in layers and tuple(layers[name]["mean"].shape) != (width,):
            misfit.append(f"{name!r} has {tuple(layers[name]['mean'].shape)} means, expected {(width,)}")
    if outputs is not None and any("output_squares" not in entry for entry in layers.values()):
        misfit.append("it was saved without output_scale='estimated'")
    if misfit:
        raise InvalidInputError(
            f"the state does not fit: {'; '.join(misfit)}. It comes from another architecture, or from other "
            "include=, exclude= or statistics="
        )
    ordered = [layers[name] for name in running.names]
    if outputs is not None:
        outputs.load(ordered)
    like = None if running.now is None else running.now.values.device
    moments = [torch.cat([entry[key] for entry in ordered]) for key in ("mean", "variance")]
    running.set(torch.stack(moments).to(like) if state["step"] else None)
    running.rows = [int(entry["rows"]) for entry in ordered]
    running.examples = [int(entry.get("examples", entry["rows"])) for entry in ordered]
    running.start = [float(entry["start"]) for entry in ordered]
    running.step = int(state["step"])
    return {i: float(entry["q2"]) for i, entry in enumerate(ordered) if entry["rows"]}
