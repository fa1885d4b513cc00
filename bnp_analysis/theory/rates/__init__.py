"""Convergence near a minimizer: formulas, the search for it, the run, and their comparison (T14, T15)."""

from __future__ import annotations

from bnp_analysis.theory.rates.formulas import HeavyBall as HeavyBall
from bnp_analysis.theory.rates.formulas import best_factor as best_factor
from bnp_analysis.theory.rates.formulas import best_heavy_ball as best_heavy_ball
from bnp_analysis.theory.rates.formulas import best_heavy_ball_factor as best_heavy_ball_factor
from bnp_analysis.theory.rates.formulas import best_step as best_step
from bnp_analysis.theory.rates.formulas import contraction_factor as contraction_factor
from bnp_analysis.theory.rates.formulas import heavy_ball_factor as heavy_ball_factor
from bnp_analysis.theory.rates.formulas import joint_spectrum as joint_spectrum
from bnp_analysis.theory.rates.formulas import time_constant as time_constant
