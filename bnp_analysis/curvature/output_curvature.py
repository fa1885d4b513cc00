"""The curvature of the loss in the network's outputs, and its square root per example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.batches import Batch
from bnp_analysis.network.risk import EmpiricalRisk

# Beyond this many numbers the per-example matrices are not formed.
_LIMIT = 200_000_000


@dataclass(frozen=True)
class OutputRoot:
    """A square root of the output Hessian per example: `S_j = root_j^T root_j`.

    Attributes:
        root: `(N, r, K)` for `K` outputs per example.
        rank: the structural rank of all examples together.
        kind: `"softmax"`, `"diagonal"` or `"general"`.
        probabilities: `(N, K)`, softmax only: the model's distribution.
        scale: `(N,)`, softmax only: the weight of each example.
    """

    root: Tensor
    rank: int
    kind: str
    probabilities: Tensor | None = None
    scale: Tensor | None = None


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


def output_root(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> OutputRoot | None:
    """The square root of the output Hessian of a batch; None if examples are coupled, or it is not convex.

    Softmax cross-entropy has the closed form `diag(sqrt p)(I - e p^T)`, whose zero singular value is exact in
    structure; the eigenvalue square root would turn it into a spurious tiny one (T13). It is recognized by its
    Hessian, `w (diag p - p p^T)`, not by the loss's name.
    """
    if outputs.ndim == 0:
        return None
    count, width = outputs.shape[0], outputs[0].numel()
    if count * width * width > _LIMIT:
        return None
    z, g = loss_gradient(risk, batch, outputs)
    flat = g.reshape(count, width)
    columns = []
    for c in range(width):
        onehot = torch.zeros_like(flat)
        onehot[:, c] = 1.0
        columns.append(hessian_product(z, g, onehot.view_as(z)).reshape(count, width))
    S = torch.stack(columns, dim=2)
    probe = torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(S)
    image = hessian_product(z, g, probe.view_as(z)).reshape(count, width)
    tolerance = 1e3 * torch.finfo(S.dtype).eps
    size = float(S.abs().max()) if S.numel() else 0.0
    if float((torch.einsum("nab,nb->na", S, probe) - image).abs().max()) > tolerance * max(size, 1e-300) * width:
        return None
    softmax = _softmax_root(outputs.detach(), S, tolerance)
    if softmax is not None:
        return softmax
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


def _softmax_root(outputs: Tensor, S: Tensor, tolerance: float) -> OutputRoot | None:
    """The closed form, where `S_j = w_j (diag p - p p^T)` with the softmax `p` over the second dimension."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return None
    p = torch.softmax(outputs, dim=1)
    closed = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    traces = 1 - p.square().sum(dim=1)
    weights = torch.diagonal(S, dim1=1, dim2=2).sum(dim=1) / traces.clamp_min(torch.finfo(p.dtype).tiny)
    # Nearly certain examples have no digits left in their curvature: they carry the common weight.
    sure = traces > 1e-3
    if not bool(sure.any()):
        return None
    common = weights[sure].median()
    ignored = torch.diagonal(S, dim1=1, dim2=2).abs().sum(dim=1) == 0
    weights = torch.where(sure | ignored, weights, common)
    size = S.abs().max()
    if bool((weights < 0).any()) or bool(((S - weights.view(-1, 1, 1) * closed).abs() > tolerance * size).any()):
        return None
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    root = (weights.unsqueeze(1) * p).sqrt().unsqueeze(2) * (eye - p.unsqueeze(1))
    rank = int((weights > 0).sum()) * (p.shape[1] - 1)
    return OutputRoot(root, rank, "softmax", p, weights)
