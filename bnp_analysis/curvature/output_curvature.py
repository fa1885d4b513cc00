"""The curvature of the loss in the network's outputs, and its square root per example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.batches import Batch
from bnp_analysis.network.kernels import derivative, recording
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.network.precision import perturbed
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.saturation import ROUNDINGS, product_eps
from bnp_analysis.network.smooth import SIGMOID, generic, monitoring
from bnp_analysis.runtime.trees import tensors_of

# Beyond this many numbers the per-example matrices are not formed.
_LIMIT = 200_000_000
# How often rounding is tried, and how many times more than seen it may be.
_TRIALS, _SAFETY = 4, 4


@dataclass(frozen=True)
class OutputRoot:
    """A square root of the output Hessian: `S_j = root_j^T root_j` for each row of outputs that the loss treats alone.

    A row is an example's; with `positions` one position's, where the loss is a sum over them. Rows keep the order of
    the outputs.

    Attributes:
        root: `(rows, r, K)` for `K` outputs per row.
        rank: the structural rank of all rows together.
        kind: `"softmax"`, `"diagonal"`, `"general"`, or `"gradients"` of a Fisher matrix.
        probabilities: `(rows, K)`, softmax only: the model's distribution.
        scale: `(rows,)`, softmax only: the weight of each row.
        axis: of the outputs, along which a row runs: the last, or that of the classes in `(N, C, ...)`.
        rounding: how far entries of `root` may be off, relative to their sizes; 0 for a few units.
        vanished: whether some zeros of `root` are none by structure.
    """

    root: Tensor
    rank: int
    kind: str
    probabilities: Tensor | None = None
    scale: Tensor | None = None
    axis: int = -1
    rounding: float = 0.0
    vanished: bool = False

    def independent(self) -> Tensor:
        """A root of as many rows as the rank allows, `(rows, r, K)`: of a softmax one row less than classes.

        For classes by ascending `p`, and `q_k` the sum of the probabilities behind the `k`-th, the rows
        `sqrt(w p_k / (q_(k-1) q_k)) (q_k e_k - sum_(j > k) p_j e_j)` are the Cholesky factor of `w (diag p - p p^T)`,
        every entry without a cancellation.

        Source: Tanabe and Sagae 1992.

        Example:
            >>> p = torch.tensor([[0.25, 0.75]])
            >>> OutputRoot(torch.zeros(1, 2, 2), 1, "softmax", p, torch.ones(1)).independent()
            tensor([[[ 0.4330, -0.4330]]])
        """
        if self.kind != "softmax" or self.probabilities is None or self.scale is None:
            return self.root
        p, order = self.probabilities.sort(dim=1)
        behind = p.flip(1).cumsum(1).flip(1)
        rest, q = behind[:, :-1], behind[:, 1:]
        size = (self.scale[:, None] * p[:, :-1]).sqrt() * (1 / rest).sqrt() * (1 / q).sqrt()
        likeliest = q.new_zeros(*q.shape, 1)
        rows = torch.cat([torch.diag_embed(q), likeliest], dim=2) - p.unsqueeze(1).expand(-1, q.shape[1], -1).triu(1)
        rows = size.unsqueeze(2) * rows
        return torch.zeros_like(rows).scatter_(2, order.unsqueeze(1).expand_as(rows), rows)

    def in_outputs(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """`(rows, K)` in the shape of the outputs."""
        return from_rows(rows, shape, self.axis)


def to_rows(outputs: Tensor, width: int, axis: int) -> Tensor:
    """Outputs as `(rows, width)`, a row along `axis`."""
    return outputs.movedim(axis, -1).reshape(-1, width)


def from_rows(rows: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The inverse of `to_rows`."""
    sizes = list(shape)
    sizes.append(sizes.pop(axis))
    return rows.reshape(sizes).movedim(-1, axis)


@recording()
def loss_gradient(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf at the outputs and the recorded gradient of the batch loss there."""
    risk.require_loss_of_outputs("this")
    z = outputs.detach().requires_grad_()
    loss = risk.batch_loss(z, batch)
    if not loss.requires_grad:
        return z, torch.zeros_like(z)
    what = f"the gradient of the loss of batch {batch.index} in the outputs"
    return z, derivative(loss, z, create_graph=True, what=what)[0]


def hessian_product(z: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """The Hessian of the batch loss in the outputs times `v`, from `loss_gradient`."""
    if not g.requires_grad:
        return torch.zeros_like(z)
    return derivative(g, z, v, retain_graph=True, what="the curvature of the loss in the outputs")[0]


def products_of_loss(risk: EmpiricalRisk) -> tuple[float, bool]:
    """The spacing at 1 of second derivatives of the risk, and whether some of the loss's own have vanished.

    The loss's curvature is tried by one product for each batch, with every operation's rounding moved.
    """

    def doubt() -> Tensor:
        found = risk.group.share(lambda: _loss_doubt(risk), "the rounding of the loss's curvature")
        return torch.tensor([max(r for r, _ in found), any(v for _, v in found)], dtype=torch.float64)

    rounding, vanished = risk.remembered("doubt", doubt, of_outputs=True).tolist()
    return max(product_eps(risk), rounding / ROUNDINGS), bool(vanished)


@recording()
def _loss_doubt(risk: EmpiricalRisk) -> tuple[float, bool]:
    rounding, vanished = 0.0, False
    tensors = risk.space.unflatten(risk.theta)
    for batch in risk.batches:
        with torch.no_grad():
            outputs = risk.batch_outputs(tensors, batch)
        if outputs.ndim and outputs.numel():
            bends = _Bends(risk, batch, outputs, outputs[0].numel())
            make = partial(_Bends.product, v=generic(bends.rows))
            image = make(bends)
            ordinary = bends.structural(make) if bool((image == 0).any()) else image
            doubt, size = bends.roundings(image, make), image.abs()
            if bends.mixes():
                # An entry of the product may cancel where no derivative does.
                doubt, size = doubt.amax(dim=1), size.amax(dim=1)
            if bool(image.any()):  # else there is no curvature to know any digits of
                rounding = max(rounding, _relative(doubt, size))
            vanished = vanished or bool(((image == 0) & (ordinary != 0)).any())
    return rounding, vanished


def bends_down(risk: EmpiricalRisk) -> bool:
    """Whether the loss is seen not to be convex in the outputs of some example; False where it couples examples."""

    def seen() -> Tensor:
        found = risk.group.share(lambda: _any_bends_down(risk), "a loss that bends down")
        return torch.tensor(any(found))

    return bool(risk.remembered("bends down", seen, of_outputs=True))


@recording()
def _any_bends_down(risk: EmpiricalRisk) -> bool:
    for batch in risk.batches:
        with torch.no_grad():
            outputs = risk.batch_outputs(risk.space.unflatten(risk.theta), batch)
        if not (outputs.ndim and outputs.numel()):
            continue
        bends = _Bends(risk, batch, outputs, outputs[0].numel())
        if (S := bends.here()) is None:
            continue
        values, _, floor = bends.spectrum(S)
        if bool((values < -floor).any()):
            return True
    return False


def output_root(risk: EmpiricalRisk, batch: Batch, outputs: Tensor, *, positions: bool = False) -> OutputRoot | None:
    """The square root of the output Hessian of a batch; None if examples are coupled, or it is not convex.

    With `positions`, rows of outputs `(N, ..., K)` or `(N, K, ...)` are positions (tokens, pixels) where the loss
    treats them alone: smaller blocks, and the softmax form for each.

    Softmax cross-entropy has the closed form `diag(sqrt p)(I - e p^T)`, whose zero singular value is exact in
    structure; the eigenvalue square root would turn it into a spurious tiny one (T13). It is recognized by its
    Hessian, `w (diag p - p p^T)`, not by the loss's name.
    """
    if outputs.ndim == 0 or outputs.numel() == 0:
        return None
    layouts = [(outputs[0].numel(), -1)]
    if positions and outputs.ndim > 2:
        layouts = [(outputs.shape[-1], -1), (outputs.shape[1], 1), *layouts]
    for width, axis in layouts:
        bends = _Bends(risk, batch, outputs, width, axis)
        S = bends.here()
        if S is not None:
            found = _softmax_root(bends, S) or (_diagonal_root if _is_diagonal(S) else _general_root)(bends, S)
            return None if found is None else replace(found, axis=axis)
    return None


def root_cotangents(risk: EmpiricalRisk, batch: Batch, outputs: Tensor, needed: str) -> Iterator[Tensor]:
    """Rows of the root of the output Hessian, those together that share no activation: of different examples.

    Raises:
        InvalidInputError: there is no root; `needed` says for what there should be one.
    """
    found = output_root(risk, batch, outputs.detach(), positions=True)
    if found is None:
        raise InvalidInputError(needed)
    examples = tensors_of(batch.x)[0].shape[0]
    apart = not risk.coupled and outputs.shape[0] == examples
    width = found.root.shape[1]
    root = found.root.reshape(examples if apart else 1, -1, width, found.root.shape[2])
    for position in range(root.shape[1]):
        for r in range(width):
            cotangent = torch.zeros_like(root[:, :, 0])
            cotangent[:, position] = root[:, position, r]
            yield found.in_outputs(cotangent, outputs.shape)


def pulled_to_layers(
    risk: EmpiricalRisk, layers: Iterable[Layer], needed: str
) -> Iterator[tuple[Layer, float, Tensor]]:
    """The rows of the output root pulled back to the outputs of layers, over this process's batches.

    Args:
        risk: the empirical risk.
        layers: the covered layers.
        needed: says for what there should be a root.

    Returns:
        For every use of a layer and every row: the layer, the batch's weight, and cotangents `(R, units)` in float64.
    """
    layers = list(layers)
    for batch in risk.batches:
        outputs, seen = risk.record(batch, layers)
        weight = batch.count / risk.batches.total
        uses = [(layer, a) for layer in layers for _, a in seen[layer.name] if a.requires_grad]
        if not (uses and outputs.requires_grad):
            continue
        for cotangent in root_cotangents(risk, batch, outputs, needed):
            activations = [a for _, a in uses]
            pulled = derivative(outputs, activations, cotangent, retain_graph=True, what="the loss by layers' outputs")
            for (layer, _), g in zip(uses, pulled, strict=True):
                yield layer, weight, layer.by_unit(g).double()


@dataclass(frozen=True)
class _Bends:
    """The Hessian of a batch's loss in each row of `width` outputs along `axis`, at any outputs."""

    risk: EmpiricalRisk
    batch: Batch
    outputs: Tensor
    width: int
    axis: int = -1

    @property
    def rows(self) -> Tensor:
        return to_rows(self.outputs.detach(), self.width, self.axis)

    def at(self, outputs: Tensor) -> Tensor | None:
        """`(rows, width, width)`; None if rows are coupled."""
        z, g = loss_gradient(self.risk, self.batch, outputs)
        count = z.numel() // self.width
        if count * self.width**2 > _LIMIT or _coupled(z, g, count, self.axis, self.risk.eps):
            return None
        return _row_hessians(z, g, self.width, self.axis)

    def elsewhere(self, rows: Tensor) -> Tensor | None:
        """The same at other rows of outputs, where the loss is defined there."""
        try:
            S = self.at(from_rows(rows.to(self.outputs), self.outputs.shape, self.axis))
        except (RuntimeError, ValueError, InvalidInputError):
            return None
        return S if S is not None and bool(torch.isfinite(S).all()) else None

    def ordinary(self, size: float) -> Tensor:
        """Rows of outputs in no relation to each other, between half of a size and three halves of it."""
        return size * generic(self.rows)

    def here(self) -> Tensor | None:
        """`S` at the outputs."""
        return self.at(self.outputs)

    def again(self) -> Tensor:
        """`S` once more, where rows are known not to be coupled."""
        return _row_hessians(*loss_gradient(self.risk, self.batch, self.outputs), self.width, self.axis)

    def product(self, v: Tensor) -> Tensor:
        """`S v`, `(rows, width)`."""
        z, g = loss_gradient(self.risk, self.batch, self.outputs)
        image = hessian_product(z, g, from_rows(v.to(z), z.shape, self.axis))
        return to_rows(image, self.width, self.axis)

    def mixes(self) -> bool:
        """Whether outputs of a row bend the loss in others, of another parity."""
        even = (torch.arange(self.width, device=self.outputs.device) % 2 == 0).expand_as(self.rows)
        return bool((self.product(even)[~even] != 0).any())

    def roundings(self, S: Tensor, make: Callable[[_Bends], Tensor]) -> Tensor:
        """How far rounding may have moved each entry of `S`: every operation is repeated with a unit more or less.

        The last operation of the model too, which has rounded the outputs: `1 - p` has few digits where `p` is near 1.
        """
        moved = torch.zeros_like(S)
        for seed in range(_TRIALS):
            other = perturbed(seed, lambda: make(replace(self, outputs=self.outputs * 1.0)))
            if other is None or other[1]:
                return torch.full_like(S, math.inf)
            moved = torch.maximum(moved, (other[0] - S).abs())
        return _SAFETY * moved

    def spectrum(self, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the rows' `S`, and how large an eigenvalue rounding explains."""
        values, vectors, floor = _eigen(S, self.risk.eps)
        moved = self.roundings(S, _Bends.again).double().sum(dim=2).amax(dim=1, keepdim=True)
        return values, vectors, torch.maximum(floor, moved)

    def structural(self, make: Callable[[_Bends], Tensor]) -> Tensor:
        """The same with derivatives of ordinary size in the place of those that saturation makes tiny."""
        with monitoring(structural=True):
            return make(self)


def _row_hessians(z: Tensor, g: Tensor, width: int, axis: int) -> Tensor:
    """The Hessian in each row of `width` outputs that are not coupled to those of others, `(rows, width, width)`."""
    count = z.numel() // width
    columns = []
    for c in range(width):
        onehot = z.new_zeros(count, width)
        onehot[:, c] = 1.0
        columns.append(to_rows(hessian_product(z, g, from_rows(onehot, z.shape, axis)), width, axis))
    return torch.stack(columns, dim=2)


def _coupled(z: Tensor, g: Tensor, count: int, axis: int, eps: float) -> bool:
    """Whether some row of outputs bends the loss in another one: between separate rows products are exactly zero.

    Rows are split by each binary digit of their index, so any two are on different sides of one of the splits.
    """
    probe = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z)
    index, width = torch.arange(count, device=z.device), z.numel() // count
    for bit in range((count - 1).bit_length()):
        side = ((index >> bit) & 1).bool().view(count, 1)
        half = from_rows(to_rows(probe, width, axis) * side, z.shape, axis)
        image = to_rows(hessian_product(z, g, half), width, axis).abs()
        if float((image * ~side).max()) > eps * float(image.max()):
            return True
    return False


def _is_diagonal(S: Tensor) -> bool:
    return torch.equal(torch.diag_embed(torch.diagonal(S, dim1=1, dim2=2)), S)


def _diagonal_root(bends: _Bends, S: Tensor) -> OutputRoot | None:
    d = torch.diagonal(S, dim1=1, dim2=2)
    if bool((d < 0).any()):
        return None
    # The product of a diagonal matrix with ones is its diagonal.
    make = partial(_Bends.product, v=torch.ones_like(d))
    doubt = bends.roundings(d, make)
    rounding = _relative(doubt, d)
    lost = rounding > ROUNDINGS * bends.risk.eps or bool((d < torch.finfo(d.dtype).tiny).any())
    if lost and (weights := _logistic_weights(bends, d, doubt)) is not None:
        # sigmoid(z) sigmoid(-z) has all its digits where a loss has lost those of p (1 - p).
        d, rounding = weights * SIGMOID.slope(bends.rows), 0.0
        counted = weights > 0
    else:
        ordinary = bends.structural(make) if bool((d == 0).any()) else d
        counted = (d > 0) | (ordinary != 0)
    vanished = bool((counted & (d < torch.finfo(d.dtype).tiny)).any())
    return OutputRoot(
        torch.diag_embed(d.sqrt()), int(counted.sum()), "diagonal", rounding=rounding / 2, vanished=vanished
    )


def _relative(doubt: Tensor, size: Tensor) -> float:
    """The largest relative doubt; where all digits are lost, 1."""
    number = torch.finfo(doubt.dtype)
    ratio = torch.where(doubt > number.tiny / number.eps, doubt / torch.where(size > 0, size, doubt), 0.0)
    return min(1.0, float(ratio.max())) if ratio.numel() else 0.0


def _logistic_weights(bends: _Bends, d: Tensor, doubt: Tensor) -> Tensor | None:
    """The weights `w` of `S_j = w_j diag(sigmoid(z) sigmoid(-z))`, found at ordinary outputs; None for other losses."""
    found = []
    for size in (0.5, 0.2):
        z = bends.ordinary(size)
        S = bends.elsewhere(z)
        if S is None or not _is_diagonal(S):
            return None
        found.append(torch.diagonal(S, dim1=1, dim2=2) / SIGMOID.slope(z))
    w, other = found
    near = (w - other).abs() <= 1e3 * bends.risk.eps * w.abs()
    same = (d - w * SIGMOID.slope(bends.rows)).abs() <= doubt + 1e3 * bends.risk.eps * d
    return w if bool((near & same & (w >= 0)).all()) else None


def _general_root(bends: _Bends, S: Tensor) -> OutputRoot | None:
    """By eigenvalues; what they leave out at ordinary outputs too is out by structure."""
    values, vectors, floor = bends.spectrum(S)
    if bool((values < -floor).any()):
        return None
    kept = values > floor
    root = torch.where(kept, values, 0.0).sqrt().unsqueeze(2) * vectors.transpose(1, 2)
    ordinary = bends.elsewhere(bends.ordinary(0.5))
    rank = kept.sum(dim=1)
    if ordinary is None:
        rank = (S != 0).any(dim=2).sum(dim=1)
    else:
        others, _, least = _eigen(ordinary, bends.risk.eps)
        rank = torch.maximum(rank, (others > least).sum(dim=1))
    vanished = bool((rank > kept.sum(dim=1)).any())
    rounding = _relative(torch.where(kept, floor, 0.0), values) / 2
    return OutputRoot(root.to(S.dtype), int(rank.sum()), "general", rounding=rounding, vanished=vanished)


def _eigen(S: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors, and what rounding explains."""
    values, vectors = torch.linalg.eigh((S + S.transpose(1, 2)).double() / 2)
    return values, vectors, S.shape[1] * eps * 10 * values.abs().amax(dim=1, keepdim=True)


def _softmax_root(bends: _Bends, S: Tensor) -> OutputRoot | None:
    """The closed form, where `S_j = w_j (diag p - p p^T)` with the softmax `p` of each row of outputs."""
    outputs, eps = bends.rows, bends.risk.eps
    if outputs.shape[1] < 2:
        return None
    p = torch.softmax(outputs, dim=1)
    closed = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    # Weights from the classes but the likeliest: their p (1 - p) keeps its digits for nearly certain rows.
    likeliest = torch.zeros_like(p).scatter_(1, p.argmax(dim=1, keepdim=True), 1.0)
    curvature = torch.diagonal(S, dim1=1, dim2=2) * (1 - likeliest)
    expected = (p * (1 - p) * (1 - likeliest)).sum(dim=1)
    weights = torch.where(expected > 0, curvature.sum(dim=1) / expected, 0.0)
    if bool((curvature < 0).any()):
        return None
    if bool((lost := expected < torch.finfo(S.dtype).tiny ** 0.5).any()):
        ordinary = bends.elsewhere(bends.ordinary(0.5))
        if ordinary is None:
            return None
        q = torch.softmax(bends.ordinary(0.5), dim=1)
        usual = torch.diagonal(ordinary, dim1=1, dim2=2).sum(dim=1) / (q * (1 - q)).sum(dim=1)
        weights = torch.where(lost, usual, weights)
    # Entry by entry, relative to the diagonal; only the likeliest class's own entry is a difference of two near ones.
    tiny = torch.finfo(S.dtype).tiny
    scale = torch.where(likeliest > 0, curvature.amax(dim=1, keepdim=True), curvature).sqrt()
    bound = 1e3 * eps * scale.unsqueeze(2) * scale.unsqueeze(1) + tiny / eps
    bound = bound + 32 * eps * weights.view(-1, 1, 1) * torch.diag_embed(likeliest)
    if bool(((S - weights.view(-1, 1, 1) * closed).abs() > bound).any()):
        return None
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    # 1 - p_c as the sum of the other probabilities: no digits lost where one class is nearly certain.
    others = p.unsqueeze(1) * (1 - eye)
    root = (weights.unsqueeze(1) * p).sqrt().unsqueeze(2) * (torch.diag_embed(others.sum(dim=2)) - others)
    rank = int((weights > 0).sum()) * (p.shape[1] - 1)
    vanished = bool(((p < torch.finfo(p.dtype).tiny) & (weights > 0).unsqueeze(1)).any())
    return OutputRoot(root, rank, "softmax", p, weights, vanished=vanished)
