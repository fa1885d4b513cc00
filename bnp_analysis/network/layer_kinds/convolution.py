"""Convolutions: a row is the patch under the kernel at one output position; transposed ones by zero insertion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network.layer_kinds.base import Layer, LayerKind, enter


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
    def _padding(self) -> list[int]:
        """Entries on either side, the last dimension first: the form of `F.pad`, whatever form the user gave."""
        return list(self.module._reversed_padding_repeated_twice)

    def rows(self, h: Tensor) -> Tensor:
        """The patch under the kernel for each output position of `h (N, c, ...)`, in the order of the weight."""
        module, spatial = self.module, self.spatial
        h = h.reshape(-1, *h.shape[-1 - spatial :])  # one image, or batches of a vmap, as (N, c, ...)
        if any(self._padding):
            h = F.pad(h, self._padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        return self._patches(h, module.stride).reshape(-1, self.groups, self.features)

    def _patches(self, h: Tensor, strides: Sequence[int]) -> Tensor:
        """What lies under the kernel at every step over padded images `(N, c, ...)`: `(N, out..., c, k...)`."""
        spatial, sizes = self.spatial, zip(self.module.kernel_size, strides, self.module.dilation, strict=True)
        for d, (size, stride, dilation) in enumerate(sizes, start=2):
            h = h.unfold(d, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # From (N, c, out..., k...).
        return h.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))

    def channels(self, h: Tensor) -> Tensor:
        return h.movedim(self.channel_axis, -1).reshape(-1, self.channel_count)

    def positions(self, h: Tensor) -> int:
        module, both = self.module, [sum(self._padding[i : i + 2]) for i in range(2 * self.spatial - 2, -1, -2)]
        sizes = zip(h.shape[-self.spatial :], both, module.kernel_size, module.stride, module.dilation, strict=True)
        return math.prod((n + pad - d * (k - 1) - 1) // s + 1 for n, pad, k, s, d in sizes)

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


class TransposedConvolutionLayer(ConvolutionLayer):
    """`nn.ConvTranspose1d`, `2d`, `3d`, without `output_size=` in their forward pass.

    With stride `s` the input gets `s - 1` zeros behind every position but the last; a row is the patch of this image
    under the turned kernel. Moments per channel are those of the image, its zeros included, since rows have them.
    """

    @classmethod
    def unlike(cls, module_type: type[nn.Module], like: type[nn.Module], *, transposed: bool) -> str:
        if not transposed:
            return "a transposed convolution, whose weight is stored transposed"
        return super().unlike(module_type, like, transposed=False)

    @classmethod
    def units_of(cls, kind: LayerKind, module: Any, weight: Tensor) -> int:
        return int(module.out_channels)

    def matrix(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return weight.transpose(0, 1)
        return weight.view(self.groups, -1, *weight.shape[1:]).transpose(1, 2)

    def image(self, h: Tensor) -> Tensor:
        h = h.reshape(-1, *h.shape[-1 - self.spatial :])
        stride = self.module.stride
        sizes = [(size - 1) * s + 1 for size, s in zip(h.shape[2:], stride, strict=True)]
        found = h.new_zeros(*h.shape[:2], *sizes)
        places: tuple[Any, ...] = (..., *(slice(None, None, s) for s in stride))
        found[places] = h
        return found

    def rows(self, h: Tensor) -> Tensor:
        """The patch under the turned kernel for each output position of `h (N, c, ...)`, in the order of the weight."""
        pads: list[int] = []
        for size, dilation, padding, more in reversed(self._geometry):
            span = dilation * (size - 1)
            pads += [span - padding, span - padding + more]
        turned = self._patches(F.pad(self.image(h), pads), [1] * self.spatial).flip(*range(-self.spatial, 0))
        return turned.reshape(-1, self.groups, self.features)

    def channels(self, h: Tensor) -> Tensor:
        return super().channels(self.image(h))

    def positions(self, h: Tensor) -> int:
        sizes = zip(h.shape[-self.spatial :], self.module.stride, self._geometry, strict=True)
        return math.prod((n - 1) * s - 2 * pad + d * (k - 1) + more + 1 for n, s, (k, d, pad, more) in sizes)

    @property
    def _geometry(self) -> list[tuple[int, int, int, int]]:
        """For each spatial dimension kernel size, dilation, padding and output padding."""
        module = self.module
        return [*zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)]

    def beyond_paper(self, rows: int, examples: int) -> list[str]:
        return ["a transposed convolution, as that of its input with zeros in between"]


enter(ConvolutionLayer, nn.Conv1d, nn.Conv2d, nn.Conv3d, builtin=True)
# Tried on the data: its forward pass may be given another output_size.
enter(TransposedConvolutionLayer, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, transposed=True)
