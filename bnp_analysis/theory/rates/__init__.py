"""Convergence near a minimizer: formulas, the search for it, the run, and their comparison (T14, T15)."""

from __future__ import annotations

from bnp_analysis.theory.rates.formulas import (
    HeavyBall,
    best_factor,
    best_heavy_ball,
    best_heavy_ball_factor,
    best_step,
    contraction_factor,
    heavy_ball_factor,
    iterations_to,
    joint_spectrum,
    time_constant,
)

__all__ = [
    "HeavyBall",
    "best_factor",
    "best_heavy_ball",
    "best_heavy_ball_factor",
    "best_step",
    "contraction_factor",
    "heavy_ball_factor",
    "iterations_to",
    "joint_spectrum",
    "time_constant",
]
