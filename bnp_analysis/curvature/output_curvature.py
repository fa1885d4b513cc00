"""The curvature of the loss in the network's outputs, and its square root per example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.batches import Batch
from bnp_analysis.network.kernels import recording
from bnp_analysis.network.risk import EmpiricalRisk

# Beyond this many numbers the per-example matrices are not formed.
_LIMIT = 200_000_000


@dataclass(frozen=True)
class OutputRoot:
    """A square root of the output Hessian: `S_j = root_j^T root_j` for each row of outputs that the loss treats alone.

    A row is an example's; with `positions` one position's, where the loss is a sum over them. Rows keep the order of
    the outputs.

    Attributes:
        root: `(rows, r, K)` for `K` outputs per row.
        rank: the structural rank of all rows together.
        kind: `"softmax"`, `"diagonal"` or `"general"`.
        probabilities: `(rows, K)`, softmax only: the model's distribution.
        scale: `(rows,)`, softmax only: the weight of each row.
    """

    root: Tensor
    rank: int
    kind: str
    probabilities: Tensor | None = None
    scale: Tensor | None = None


@recording()
def loss_gradient(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf at the outputs and the recorded gradient of the batch loss there."""
    risk.require_loss_of_outputs("this")
    z = outputs.detach().requires_grad_()
    loss = risk.batch_loss(z, batch)
    if not loss.requires_grad:
        return z, torch.zeros_like(z)
    (g,) = torch.autograd.grad(loss, z, create_graph=True, allow_unused=True, materialize_grads=True)
    return z, g


def hessian_product(z: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """The Hessian of the batch loss in the outputs times `v`, from `loss_gradient`."""
    if not g.requires_grad:
        return torch.zeros_like(z)
    return torch.autograd.grad(g, z, v, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


def output_root(risk: EmpiricalRisk, batch: Batch, outputs: Tensor, *, positions: bool = False) -> OutputRoot | None:
    """The square root of the output Hessian of a batch; None if examples are coupled, or it is not convex.

    With `positions`, rows of outputs `(N, ..., K)` are positions (tokens, pixels) where the loss treats them alone:
    smaller blocks, and the softmax form for each.

    Softmax cross-entropy has the closed form `diag(sqrt p)(I - e p^T)`, whose zero singular value is exact in
    structure; the eigenvalue square root would turn it into a spurious tiny one (T13). It is recognized by its
    Hessian, `w (diag p - p p^T)`, not by the loss's name.
    """
    if outputs.ndim == 0 or outputs.numel() == 0:
        return None
    z, g = loss_gradient(risk, batch, outputs)
    widths = [outputs[0].numel()]
    if positions and outputs.ndim > 2:
        widths.insert(0, outputs.shape[-1])
    for width in widths:
        S = _row_hessians(z, g, width)
        if S is not None:
            return _row_roots(outputs.detach().reshape(-1, width), S)
    return None


def _row_hessians(z: Tensor, g: Tensor, width: int) -> Tensor | None:
    """The Hessian in each row of `width` outputs, `(rows, width, width)`; None if rows are coupled."""
    count = z.numel() // width
    if count * width * width > _LIMIT:
        return None
    columns = []
    for c in range(width):
        onehot = z.new_zeros(count, width)
        onehot[:, c] = 1.0
        columns.append(hessian_product(z, g, onehot.view_as(z)).reshape(count, width))
    S = torch.stack(columns, dim=2)
    return None if _coupled(z, g, count) else S


def _coupled(z: Tensor, g: Tensor, count: int) -> bool:
    """Whether some row of outputs bends the loss in another one: between separate rows products are exactly zero.

    Rows are split by each binary digit of their index, so any two are on different sides of one of the splits.
    """
    probe = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z)
    index = torch.arange(count, device=z.device)
    for bit in range((count - 1).bit_length()):
        side = ((index >> bit) & 1).bool().view(count, 1)
        image = hessian_product(z, g, (probe.reshape(count, -1) * side).view_as(z)).reshape(count, -1).abs()
        if float((image * ~side).max()) > torch.finfo(z.dtype).eps * float(image.max()):
            return True
    return False


def _row_roots(outputs: Tensor, S: Tensor) -> OutputRoot | None:
    softmax = _softmax_root(outputs, S)
    if softmax is not None:
        return softmax
    width = S.shape[1]
    diagonal = torch.diagonal(S, dim1=1, dim2=2)
    if torch.equal(torch.diag_embed(diagonal), S):
        if bool((diagonal < 0).any()):
            return None
        return OutputRoot(torch.diag_embed(diagonal.sqrt()), int((diagonal > 0).sum()), "diagonal")
    values, vectors = torch.linalg.eigh((S + S.transpose(1, 2)).double() / 2)
    floor = width * torch.finfo(S.dtype).eps * 10 * values.abs().amax(dim=1, keepdim=True)
    if bool((values < -floor).any()):
        return None
    kept = values > floor
    root = torch.where(kept, values, 0.0).sqrt().unsqueeze(2) * vectors.transpose(1, 2)
    return OutputRoot(root.to(S.dtype), int(kept.sum()), "general")


def _softmax_root(outputs: Tensor, S: Tensor) -> OutputRoot | None:
    """The closed form, where `S_j = w_j (diag p - p p^T)` with the softmax `p` of each row of outputs."""
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
    # Entry by entry, relative to the diagonal; only the likeliest class's own entry is a difference of two near ones.
    unit = torch.finfo(S.dtype)
    scale = torch.where(likeliest > 0, curvature.amax(dim=1, keepdim=True), curvature).sqrt()
    bound = 1e3 * unit.eps * scale.unsqueeze(2) * scale.unsqueeze(1) + unit.tiny / unit.eps
    bound = bound + 32 * unit.eps * weights.view(-1, 1, 1) * torch.diag_embed(likeliest)
    if bool(((S - weights.view(-1, 1, 1) * closed).abs() > bound).any()):
        return None
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    # 1 - p_c as the sum of the other probabilities: no digits lost where one class is nearly certain.
    others = p.unsqueeze(1) * (1 - eye)
    root = (weights.unsqueeze(1) * p).sqrt().unsqueeze(2) * (torch.diag_embed(others.sum(dim=2)) - others)
    rank = int((weights > 0).sum()) * (p.shape[1] - 1)
    return OutputRoot(root, rank, "softmax", p, weights)
