"""Convolutions: the patch under the kernel is a row, one for each output position."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network.layer_kinds.base import KINDS, Layer, LayerKind


class ConvolutionLayer(Layer):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any padding, stride, dilation and groups."""

    @staticmethod
    def groups_of(module: Any) -> int:
        return int(module.groups)

    @classmethod
    def unlike(cls, module_type: type[nn.Module], like: type[nn.Module], *, transposed: bool) -> str:
        if transposed:
            return "a convolution that is stored transposed"
        return "" if issubclass(module_type, like) else f"no subclass of {like.__name__}, whose geometry would be known"

    @property
    def spatial(self) -> int:
        return len(self.module.kernel_size)

    @property
    def patch(self) -> int:
        return math.prod(self.module.kernel_size)

    @property
    def pads_zeros(self) -> bool:
        return self.module.padding_mode == "zeros" and any(self._padding)

    @property
    def _padding(self) -> list[int]:
        """Entries on either side, the last dimension first: the form of `F.pad`, whatever form the user gave."""
        return list(self.module._reversed_padding_repeated_twice)

    def rows(self, h: Tensor) -> Tensor:
        """The patch under the kernel for each output position of `h (N, c, ...)`, in the order of the weight."""
        module, spatial = self.module, self.spatial
        h = h.reshape(-1, *h.shape[-1 - spatial :])  # one image, or batches of a vmap, as (N, c, ...)
        if any(self._padding):
            h = F.pad(h, self._padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        for d, (size, stride, dilation) in enumerate(sizes, start=2):
            span = dilation * (size - 1) + 1
            h = h.unfold(d, span, stride)[..., ::dilation]
        # (N, c, out..., k...) -> (N, out..., c, k...)
        h = h.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
        return h.reshape(-1, self.groups, self.features)

    def channels(self, h: Tensor) -> Tensor:
        return h.movedim(self.channel_axis, -1).reshape(-1, self.channel_count)

    def positions(self, h: Tensor) -> int:
        module, padding = self.module, self._padding
        count = 1
        for d, size in enumerate(h.shape[-self.spatial :]):
            reverse = 2 * (self.spatial - 1 - d)
            full = size + padding[reverse] + padding[reverse + 1]
            span = module.dilation[d] * (module.kernel_size[d] - 1) + 1
            count *= (full - span) // module.stride[d] + 1
        return count

    def beyond_paper(self, rows: int, examples: int) -> list[str]:
        module, found = self.module, []
        if self.spatial != 2:
            found.append(f"{self.spatial} spatial dimensions, by the root of the number of positions")
        if any(s != 1 for s in module.stride):
            found.append("stride, by its own output positions")
        if any(d != 1 for d in module.dilation):
            found.append("dilation, by its own output positions")
        if module.groups > 1:
            found.append("groups, with the channels of one group")
        spans = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        kept = [span / 2 for span in reversed(spans) for _ in range(2)]
        if module.padding_mode != "zeros" or self._padding != kept:
            found.append("padding other than zeros that keep the size, by its own output positions")
        return found


for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    KINDS[kind] = LayerKind(kind, ConvolutionLayer, builtin=True)
