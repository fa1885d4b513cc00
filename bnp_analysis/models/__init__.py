"""Networks of the experiments, with a choice of activation, normalization and its position."""

from bnp_analysis.models.networks import MODELS, build, build_for, cnn, mlp, resnet, transformer
from bnp_analysis.models.parts import ACTIVATIONS, NORM_PLACES, NORMS

__all__ = ["ACTIVATIONS", "MODELS", "NORMS", "NORM_PLACES", "build", "build_for", "cnn", "mlp", "resnet", "transformer"]
