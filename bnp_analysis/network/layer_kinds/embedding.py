"""Embeddings: the row of an index is a one-hot vector, never formed; moments are frequencies."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network.layer_kinds.base import Layer, enter


class EmbeddingLayer(Layer):
    """`nn.Embedding`: the table `(vocabulary, units)` times an indicator of the index.

    Feature `v` has mean `p_v`, the frequency of index `v`, and variance `p_v (1 - p_v)`. An index `padding_idx` has no
    gradient, so its row is zero.
    """

    @classmethod
    def refused(cls, module: Any) -> str:
        if module.max_norm is not None:
            return "max_norm changes its rows on the way"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq makes another gradient than that of the loss"
        return "its gradient is sparse" if module.sparse else ""

    def rows(self, h: Tensor) -> Tensor:
        """The indicators, dense: for curvature and tables of small vocabularies."""
        rows = F.one_hot(h.long(), self.features).to(self.own_weight.dtype).reshape(-1, 1, self.features)
        if self.module.padding_idx is not None:
            rows[..., self.module.padding_idx] = 0
        return rows

    def counted(self, h: Tensor) -> tuple[int, Tensor]:
        counts = h.flatten().long().bincount(minlength=self.features)
        if self.module.padding_idx is not None:
            counts[self.module.padding_idx] = 0
        return h.numel(), counts

    def example_count(self, h: Tensor) -> int:
        return h.shape[0] if h.ndim else 1


enter(EmbeddingLayer, nn.Embedding, transposed=True, builtin=True, asked=True)
