"""Transposed convolutions: convolutions of the input with zeros put between its positions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network.layer_kinds.base import KINDS, LayerKind
from bnp_analysis.network.layer_kinds.convolution import ConvolutionLayer


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

    @property
    def pads_zeros(self) -> bool:
        return True

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
        module, spatial = self.module, self.spatial
        pads: list[int] = []
        for size, dilation, padding, more in reversed(self._geometry):
            span = dilation * (size - 1)
            pads += [span - padding, span - padding + more]
        h = F.pad(self.image(h), pads)
        for d, (size, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True), start=2):
            h = h.unfold(d, dilation * (size - 1) + 1, 1)[..., ::dilation]
        h = h.flip(*range(2 + spatial, 2 + 2 * spatial))
        h = h.permute(0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
        return h.reshape(-1, self.groups, self.features)

    def channels(self, h: Tensor) -> Tensor:
        return super().channels(self.image(h))

    def positions(self, h: Tensor) -> int:
        count = 1
        for n, s, (size, dilation, padding, more) in zip(
            h.shape[-self.spatial :], self.module.stride, self._geometry, strict=True
        ):
            count *= (n - 1) * s - 2 * padding + dilation * (size - 1) + more + 1
        return count

    @property
    def _geometry(self) -> list[tuple[int, int, int, int]]:
        """For each spatial dimension kernel size, dilation, padding and output padding."""
        module = self.module
        return [*zip(module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True)]

    def beyond_paper(self, rows: int, examples: int) -> list[str]:
        return ["a transposed convolution, as that of its input with zeros in between"]


for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    # Tried on the data: its forward pass may be given another output_size.
    KINDS[kind] = LayerKind(kind, TransposedConvolutionLayer, transposed=True)
