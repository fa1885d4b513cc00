"""The preconditioner of K-FAC, a Kronecker product for each layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor

from bnp_analysis.curvature.output_curvature import pulled_to_layers
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.layers import Coverage
from bnp_analysis.network.moments import second_moments
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.base import BlockDiagonal, Entry, covered_layers, layer_positions
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import require_memory

_NEEDS = "the loss is not convex in the outputs, or not separate over examples: K-FAC has no output factor"


class KroneckerBlock(Preconditioner):
    """`P = S^(-1/2) (x) A^(-1/2)` of one layer, on its flat tensors (weight row-major, then bias); symmetric.

    Args:
        inputs: `A`, `(groups, d, d)`, positive definite, `d = m` or, with a bias, `m + 1` with the bias last.
        outputs: `S`, `(groups, n/groups, n/groups)`, positive definite.
        bias: whether the last variables are the bias.
        dtype: of the variables, default that of the matrices; these may be more precise.

    Raises:
        InvalidInputError: shapes that do not fit, or a matrix that is not positive definite to rounding.

    Example:
        >>> P = KroneckerBlock(torch.tensor([[[4.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 16.0]]]), bias=False)
        >>> P.apply(torch.ones(2)).tolist()
        [0.5, 0.125]
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, *, bias: bool, dtype: torch.dtype | None = None) -> None:
        if inputs.ndim != 3 or outputs.ndim != 3 or inputs.shape[0] != outputs.shape[0]:
            raise InvalidInputError(
                f"the factors must be (groups, d, d) and (groups, n, n), got {tuple(inputs.shape)} and "
                f"{tuple(outputs.shape)}"
            )
        self._groups, self._units, self._width = inputs.shape[0], outputs.shape[1], inputs.shape[1]
        super().__init__(self._groups * self._units * self._width, dtype or inputs.dtype, inputs.device)
        self._bias = bias
        self._roots = tuple(
            tuple(part.to(self.dtype) for part in _roots(matrix, what))
            for matrix, what in ((outputs, "output"), (inputs, "input"))
        )

    def _matmat(self, x: Tensor) -> Tensor:
        return self._both_sides(x, *(inverse for _, inverse in self._roots))

    def _solve(self, x: Tensor) -> Tensor:
        return self._both_sides(x, *(root for root, _ in self._roots))

    _rmatmat, _rsolve = _matmat, _solve

    def absolute(self) -> LinearOperator:
        other = copy.copy(self)
        other._roots = tuple((root, inverse.abs()) for root, inverse in self._roots)
        return other

    def _both_sides(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """`L Z R` for each group, the columns of `x` as matrices `Z` with a row per unit and the bias last."""
        k, units = x.shape[1], self._groups * self._units
        features = self._width - int(self._bias)
        cut = units * features
        z = x[:cut].T.reshape(k, self._groups, self._units, features)
        if self._bias:
            z = torch.cat([z, x[cut:].T.reshape(k, self._groups, self._units, 1)], dim=3)
        z = left @ z @ right
        flat = z[..., :features].reshape(k, cut)
        if self._bias:
            flat = torch.cat([flat, z[..., features].reshape(k, units)], dim=1)
        return flat.T


def _roots(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """`M^(1/2)` and `M^(-1/2)` of each matrix of a stack, from eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values.amax(dim=-1)
    if not bool((values[..., 0] > floor).all()):
        raise InvalidInputError(
            f"the {what} factor is singular to rounding (eigenvalues from {float(values.min()):.3g} to "
            f"{float(values.max()):.3g}), so its inverse root does not exist; a positive damping= makes it definite"
        )
    root = values.sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


class KroneckerPreconditioner(BlockDiagonal):
    """The K-FAC preconditioner of a network: a `KroneckerBlock` for each layer."""


@overload
def kfac_preconditioner(
    risk: EmpiricalRisk, *, damping: float = ..., block: None = None
) -> KroneckerPreconditioner: ...
@overload
def kfac_preconditioner(risk: EmpiricalRisk, *, damping: float = ..., block: Block) -> Preconditioner: ...
@gated
def kfac_preconditioner(
    risk: EmpiricalRisk, *, damping: float = 1e-3, block: Block | None = None
) -> KroneckerPreconditioner | Preconditioner:
    """K-FAC: `P = S^(-1/2) (x) A^(-1/2)` for every covered layer, from exact second moments over the risk's data.

    `A = H^^T H^ / R` is the second moment of the extended inputs, `S = (1/N) sum_jt J_jt^T (d^2 l_j / d f_j^2) J_jt`
    that of the Gauss-Newton rows pulled back to the layer's outputs, `t` over its positions. `S (x) A` is the
    Gauss-Newton block of the layer where the two are independent over rows. A grouped convolution has its own factors
    in each group.

    Args:
        risk: the empirical risk; its loss must be convex in the outputs and separate over examples.
        damping: relative to the mean eigenvalue of each factor, `A + damping tr(A)/d I` and the same for `S`: factored
            Tikhonov damping by `damping^2 (tr A/d)(tr S/n)`. 0 where both factors are nonsingular.
        block: only the part of `P` on a layer; units are coupled.

    Returns:
        A `KroneckerPreconditioner` over `risk.space`, or its block; an uncovered parameter is left alone and named in
        `uncovered`.

    Raises:
        InvalidInputError: no covered layer, a loss without a Gauss-Newton factor, negative damping, or none where a
            factor is singular (softmax: that of the output layer always is).
        MemoryLimitError: the factors would not fit; said before any is made.

    Source: Martens and Grosse 2015; Grosse and Martens 2016 for convolutions.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, (x, y))
        >>> P = bnp.kfac_preconditioner(risk, damping=0)
        >>> bnp.linalg.congruence(bnp.gauss_newton(risk), P).to_dense().round(decimals=5)
        tensor([[1., 0.],
                [0., 1.]])
    """
    layers = covered_layers(risk, "K-FAC")
    layers = layers.without(lambda layer: layer.kind.gain, "K-FAC has no factors of pruned and parametrized weights")
    sizes = [
        layer.groups * (d * d + n * n)
        for layer in layers
        for d, n in [(layer.features + int(layer.bias is not None), layer.units // layer.groups)]
    ]
    # Moments and their damped copies, the two roots of each, and of one layer eigenvectors and what makes them.
    require_memory(
        8 * (4 * sum(sizes) + 4 * max(sizes, default=0)),
        f"K-FAC's factors of {len(sizes)} layers",
        "Use bnp_preconditioner(risk) or diagonal_preconditioner(risk), which hold a vector",
        device=risk.space.device,
    )
    inputs, outputs = second_moments(risk, layers), output_moments(risk, layers)
    blocks: dict[str, Entry] = {}
    for layer in layers:
        A, S = (_damped(moments[layer.name], damping) for moments in (inputs, outputs))
        try:
            inner = KroneckerBlock(A, S, bias=layer.bias is not None, dtype=risk.space.dtype)
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {layer.name!r}: {error}") from error
        blocks[layer.name] = (layer_positions(layer, risk.space), inner)
    space, settings = risk.space, {"damping": damping}
    P = KroneckerPreconditioner(
        space.dim, blocks, space.dtype, space.device, space, settings=settings, uncovered=layers.uncovered
    )  # fmt: skip
    return P if block is None else P.block(block)


def _damped(moments: Tensor, damping: float) -> Tensor:
    """`M + damping tr(M)/d I`; the identity in place of a zero matrix, which has nothing to scale by."""
    size = moments.diagonal(dim1=1, dim2=2).mean(dim=1).view(-1, 1, 1)
    eye = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
    return torch.where(size > 0, moments + damping * size * eye, eye)


def output_moments(risk: EmpiricalRisk, layers: Coverage) -> dict[str, Tensor]:
    """`S` of every covered layer: the second moment of the Gauss-Newton rows pulled back to its outputs.

    Returns:
        Layer name -> `(groups, n/groups, n/groups)`, float64: the mean over examples, the sum over positions.

    Raises:
        InvalidInputError: the loss is not convex in the outputs, or not separate over examples.
    """
    shapes = {layer.name: (layer.groups, *2 * [layer.units // layer.groups]) for layer in layers}
    total = risk.group.sum(lambda: _own_output_moments(risk, layers, shapes), "output moments")
    parts = torch.split(total, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _own_output_moments(risk: EmpiricalRisk, layers: Coverage, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """What this process's batches add, one layer behind the other."""
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=risk.space.device) for name, shape in shapes.items()}
    for layer, weight, pulled in pulled_to_layers(risk, layers, _NEEDS):
        g = pulled.view(-1, layer.groups, layer.units // layer.groups).transpose(0, 1)
        gram = g.transpose(1, 2) @ g * weight
        sums[layer.name] += gram
    return torch.cat([gram.reshape(-1) for gram in sums.values()])
