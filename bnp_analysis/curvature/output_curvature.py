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
    probe = torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(S)
    image = hessian_product(z, g, probe.view_as(z)).reshape(count, width)
    error = float((torch.einsum("nab,nb->na", S, probe) - image).abs().max())
    return None if error > _tolerance(S) * max(float(S.abs().max()), 1e-300) * width else S


def _tolerance(S: Tensor) -> float:
    return 1e3 * torch.finfo(S.dtype).eps


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
    others = torch.ones_like(p).scatter_(1, p.argmax(dim=1, keepdim=True), 0.0)
    curvature = (torch.diagonal(S, dim1=1, dim2=2) * others).sum(dim=1)
    expected = (p * (1 - p) * others).sum(dim=1)
    weights = torch.where(expected > 0, curvature / expected, 0.0)
    error = (S - weights.view(-1, 1, 1) * closed).abs()
    if bool((weights < 0).any()) or bool((error > _tolerance(S) * S.abs().max()).any()):
        return None
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    root = (weights.unsqueeze(1) * p).sqrt().unsqueeze(2) * (eye - p.unsqueeze(1))
    rank = int((weights > 0).sum()) * (p.shape[1] - 1)
    return OutputRoot(root, rank, "softmax", p, weights)
