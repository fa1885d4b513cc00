"""Networks of the experiments, each with a choice of activation, normalization and its place."""

from bnp_analysis.models.networks import MODELS, build, build_for, cnn, mlp, resnet, transformer
from bnp_analysis.models.parts import ACTIVATIONS, NORM_PLACES, NORMS

__all__ = ["ACTIVATIONS", "MODELS", "NORMS", "NORM_PLACES", "build", "build_for", "cnn", "mlp", "resnet", "transformer"]
