"""Gains and offsets of normalizations: a unit's one input is its normalized feature or channel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnp_analysis.network.layer_kinds.base import Layer, LayerKind, enter


class NormLayer(Layer):
    """The gains and offsets of a normalization: `a_i = w_i x_i + b_i` of what it has normalized."""

    @staticmethod
    def groups_of(module: Any) -> int:
        return int(module.weight.numel())

    @classmethod
    def units_of(cls, kind: LayerKind, module: Any, weight: Tensor) -> int:
        return weight.numel()

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(1)


class FeatureNormLayer(NormLayer):
    """`nn.LayerNorm` and `nn.RMSNorm` over the last dimension."""

    @classmethod
    def refused(cls, module: Any) -> str:
        return "" if len(module.normalized_shape) == 1 else "it normalizes several dimensions"

    def rows(self, h: Tensor) -> Tensor:
        """The normalized features of every position, `(R, units, 1)`."""
        module = self.module
        norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        return norm(h, module.normalized_shape, eps=module.eps).reshape(-1, self.units, 1)


class ChannelNormLayer(NormLayer):
    """`nn.GroupNorm` and `nn.InstanceNorm1d/2d/3d`, whose units are channels, with a row for every position."""

    def rows(self, h: Tensor) -> Tensor:
        """The normalized channels of every position, `(R, units, 1)`."""
        return self.by_unit(_normalized(self.module, h if self._axis(h) else h.unsqueeze(0))).unsqueeze(2)

    def by_unit(self, g: Tensor) -> Tensor:
        return g.movedim(self._axis(g), -1).reshape(-1, self.units)

    def example_count(self, h: Tensor) -> int:
        return h.shape[0] if self._axis(h) else 1

    def _axis(self, h: Tensor) -> int:
        """The axis of the channels; only an instance normalization takes an example by itself."""
        alone: Any = getattr(self.module, "_get_no_batch_dim", None)
        return 0 if alone is not None and h.ndim == alone() else 1


class BatchNormLayer(ChannelNormLayer):
    """`nn.BatchNorm1d/2d/3d`, by the statistics that its mode takes: in a model that trains its gains do in either."""

    own_mode = False


def _normalized(module: Any, h: Tensor) -> Tensor:
    """The input without mean and variance: those of each example or of the batch, or the running ones."""
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(h, module.num_groups, eps=module.eps)
    norm: Any = F.batch_norm if isinstance(module, _BatchNorm) else F.instance_norm
    own = module.training or module.running_mean is None
    mean, variance = (None, None) if own else (module.running_mean.to(h), module.running_var.to(h))
    found: Tensor = norm(h, mean, variance, None, None, own, eps=module.eps)
    return found


enter(FeatureNormLayer, nn.LayerNorm, nn.RMSNorm, builtin=True, asked=True)
_BY_CHANNEL = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
enter(ChannelNormLayer, *_BY_CHANNEL, builtin=True, asked=True)
enter(BatchNormLayer, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, builtin=True, asked=True)
