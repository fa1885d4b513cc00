"""A model as a function of flat parameters: its risk, its layers, and the rows of their inputs."""

from bnp_analysis.network.layer_kinds import Layer, register_layer
from bnp_analysis.network.layers import Coverage, coverage
from bnp_analysis.network.moments import Moments, layer_moments, layer_rows
from bnp_analysis.network.parameters import ParameterSpace
from bnp_analysis.network.risk import EmpiricalRisk

__all__ = [
    "Coverage",
    "EmpiricalRisk",
    "Layer",
    "Moments",
    "ParameterSpace",
    "coverage",
    "layer_moments",
    "layer_rows",
    "register_layer",
]
