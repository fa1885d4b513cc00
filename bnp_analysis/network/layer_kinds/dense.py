"""Dense layers: every position before the last dimension is a row."""

from __future__ import annotations

from torch import Tensor, nn

from bnp_analysis.network.layer_kinds.base import KINDS, Layer, LayerKind


class DenseLayer(Layer):
    """`nn.Linear`, with any leading dimensions."""

    rows_are_inputs = True

    def rows(self, h: Tensor) -> Tensor:
        """Every leading position of `h (..., m)`."""
        return h.reshape(-1, 1, self.features)

    def beyond_paper(self, rows: int, examples: int) -> list[str]:
        if rows <= examples:
            return []
        return [f"{rows / examples:g} positions an example, as of a convolution with kernel size 1"]


KINDS[nn.Linear] = LayerKind(nn.Linear, DenseLayer, builtin=True)
