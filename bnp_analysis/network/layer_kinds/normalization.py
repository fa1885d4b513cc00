"""The gains and offsets of layer normalizations: every unit has one input, the normalized feature of its own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network.layer_kinds.base import KINDS, Layer, LayerKind


class NormLayer(Layer):
    """`nn.LayerNorm` and `nn.RMSNorm` over the last dimension: `a_i = w_i x_i + b_i` of the normalized features `x`."""

    @staticmethod
    def groups_of(module: Any) -> int:
        return int(module.weight.numel())

    @classmethod
    def refused(cls, module: Any) -> str:
        return "" if len(module.normalized_shape) == 1 else "it normalizes several dimensions"

    @classmethod
    def units_of(cls, kind: LayerKind, module: Any, weight: Tensor) -> int:
        return weight.numel()

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(1)

    def rows(self, h: Tensor) -> Tensor:
        """The normalized features of every position, `(R, units, 1)`."""
        module = self.module
        norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        return norm(h, module.normalized_shape, eps=module.eps).reshape(-1, self.units, 1)

    def example_count(self, h: Tensor) -> int:
        return h.shape[0] if h.ndim > 1 else 1


for kind in (nn.LayerNorm, nn.RMSNorm):
    KINDS[kind] = LayerKind(kind, NormLayer, builtin=True, asked=True)
