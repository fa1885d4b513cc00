"""The registry of layer kinds: each file defines how one kind turns inputs into rows; other code checks no types."""

from bnp_analysis.network.layer_kinds.base import (
    KINDS,
    Layer,
    LayerKind,
    by_module,
    kind_of,
    kinds_of,
    register_layer,
)
from bnp_analysis.network.layer_kinds.convolution import ConvolutionLayer, TransposedConvolutionLayer
from bnp_analysis.network.layer_kinds.dense import DenseLayer, recognize
from bnp_analysis.network.layer_kinds.embedding import EmbeddingLayer
from bnp_analysis.network.layer_kinds.normalization import BatchNormLayer, ChannelNormLayer, FeatureNormLayer
from bnp_analysis.network.layer_kinds.recurrent import RecurrentMap

__all__ = [
    "KINDS",
    "BatchNormLayer",
    "ChannelNormLayer",
    "ConvolutionLayer",
    "DenseLayer",
    "EmbeddingLayer",
    "FeatureNormLayer",
    "Layer",
    "LayerKind",
    "RecurrentMap",
    "TransposedConvolutionLayer",
    "by_module",
    "kind_of",
    "kinds_of",
    "recognize",
    "register_layer",
]
