"""Fisher matrices: expected under the model's own distribution by sampling, and empirical."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bnp_analysis.curvature.engines import CURVATURES, EngineOperator, restricted
from bnp_analysis.curvature.factors import JacobianFactor, batch_roots
from bnp_analysis.curvature.gauss_newton import require_output_curvature
from bnp_analysis.curvature.output_curvature import OutputRoot, bends_down, loss_gradient, output_root
from bnp_analysis.curvature.products import OutputGraph
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.purity import is_mean
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.smooth import monitoring
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.random import generator, uniform_at
from bnp_analysis.runtime.trees import tensors_of

Make = Callable[[EmpiricalRisk, Batch, Tensor], OutputRoot | None]
KINDS = ("mc", "empirical")


class Fisher(EngineOperator[OutputGraph]):
    """`F^T F` with rows that are scaled gradients; made by `fisher`."""

    def __init__(self, risk: EmpiricalRisk, make: Make, engine: str = "auto", max_memory: int | None = None) -> None:
        made = batch_roots(risk, make)
        if made is None and bends_down(risk):
            raise InvalidInputError(
                "no distribution is known for this loss: it bends down in the outputs, and no variance is negative. "
                "Use kind='empirical', or gauss_newton, which needs none"
            )
        if made is None:
            raise InvalidInputError(
                "the Fisher matrix needs one gradient per example, so a loss that is separate over examples, and data "
                "that keep their order: give list(loader) or a loader without shuffle"
            )
        self._factor = JacobianFactor(risk, made, engine, max_memory)
        super().__init__(risk, self._factor.graphs)

    def product(self, graph: OutputGraph, batch: int, v: list[Tensor], retain: bool) -> list[Tensor]:
        return self._factor.gram_product(graph, batch, v, retain)

    @property
    def eps(self) -> float:
        return self._factor.eps

    @property
    def factor(self) -> LinearOperator:
        return self._factor


@gated
def fisher(
    risk: EmpiricalRisk,
    kind: str = "mc",
    *,
    samples: int = 1,
    seed: int = 0,
    block: Block | None = None,
    engine: str = "auto",
    max_memory: int | None = None,
) -> SymmetricOperator:
    """The Fisher matrix `A = (1/N) sum_j E[g_j g_j^T]`, `g_j` the gradient of the loss of example `j`.

    Args:
        risk: the empirical risk; its loss is read as a negative log-likelihood.
        kind: `"mc"` draws the target from the model's own distribution (softmax cross-entropy: a class; losses
            with a diagonal output Hessian, as squared loss: a Gaussian score of that variance), `"empirical"` takes
            the data's.
        samples: draws per example, `"mc"` only.
        seed: of the draws; those of an example depend on its place in the data alone, not on batches or processes.
        block: as in `hessian`.
        engine, max_memory: as in `hessian`.

    Returns:
        A `SymmetricOperator` with a `factor`. The expectation of `"mc"` is the Gauss-Newton matrix for these
        losses; `"empirical"` is another matrix.

    Raises:
        InvalidInputError: an unknown kind, a loss without a known distribution, or not a mean over examples.
        MemoryLimitError: at the first product: not even one batch fits.

    Source: Kunstner, Balles and Hennig 2019 for the difference of the two.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, (x, y))
        >>> bnp.fisher(risk, "empirical").factor.shape
        (3, 8)
    """
    if kind not in KINDS:
        raise InvalidInputError(f"kind must be 'mc' or 'empirical', got {kind!r}")
    require_output_curvature(risk, "fisher")

    def build(r: EmpiricalRisk) -> Fisher:
        # A sampler for every operator: a block and the whole see the same targets.
        make = _empirical if kind == "empirical" else _sampler(samples, seed)
        return Fisher(r, make, engine, max_memory)

    return restricted(risk, block, build)


for _kind in KINDS:
    CURVATURES[f"fisher_{_kind}"] = partial(fisher, kind=_kind)


def _empirical(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> OutputRoot | None:
    """Row `j` is `sqrt(w_j) dl_j/df_j`, with `dL/df_j = w_j dl_j/df_j`: an example's own gradient, its share `w_j`."""
    if is_mean(risk, batch) is False:
        raise InvalidInputError("the loss is not a mean over the batch, so an example has no gradient of its own")
    _, g = loss_gradient(risk, batch, outputs)
    count = outputs.shape[0]
    shares = _shares(risk, batch, outputs).clamp_min(torch.finfo(g.dtype).tiny)
    root = g.detach().reshape(count, 1, -1) / shares.to(g).sqrt().view(-1, 1, 1)
    with monitoring(structural=True):
        ordinary = loss_gradient(risk, batch, outputs)[1].reshape(count, -1)
    vanished = bool(((ordinary != 0) & (g.detach().reshape(count, -1) == 0)).any())
    return OutputRoot(root, count, "gradients", vanished=vanished)


def _shares(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> Tensor:
    """How much of the batch's mean each row of outputs is."""
    size, count = tensors_of(batch.x)[0].shape[0], outputs.shape[0]
    parts = [slice_batch(batch, j, j + 1) for j in range(size)] if count == size else []
    weights = torch.tensor([0.0 if part is None else risk.batches.weigh(part) for part in parts], dtype=torch.float64)
    if parts and abs(float(weights.sum()) - batch.count) <= 1e-6 * batch.count:
        return weights / weights.sum()
    return torch.full((count,), 1 / count, dtype=torch.float64)


def _sampler(samples: int, seed: int) -> Make:
    generator(seed)  # refuses what is no seed
    seen = 0

    def draw(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> OutputRoot | None:
        nonlocal seen
        begin, size = risk.batches.before + seen, tensors_of(batch.x)[0].shape[0]
        seen += size
        found = output_root(risk, batch, outputs, positions=True)
        if found is None:
            return None
        count, _, width = found.root.shape
        # An example's place in the data, and a row's in its example; rows that belong to none count on from the first.
        each = count // size if count % size == 0 else count
        row = torch.arange(count)
        example, place = (begin + row // each).unsqueeze(1), (row % each).unsqueeze(1) * samples * width
        if found.kind == "softmax" and found.probabilities is not None and found.scale is not None:
            p = found.probabilities
            below = p.double().cpu().cumsum(dim=1)
            u = uniform_at(seed, example, place + torch.arange(samples)) * below[:, -1:]
            classes = torch.searchsorted(below, u).to(p.device)
            onehot = torch.nn.functional.one_hot(classes, width).to(p.dtype)
            # p - 1 of the class that was drawn is minus the sum of the others.
            others = p.unsqueeze(1) * (1 - onehot)
            root = (others - onehot * others.sum(dim=2, keepdim=True)) * (found.scale / samples).sqrt().view(-1, 1, 1)
        elif found.kind == "diagonal":
            u = uniform_at(seed, example, place + torch.arange(samples * width))
            noise = torch.special.ndtri(u).view(count, samples, width).to(outputs)
            root = noise @ found.root / samples**0.5
        else:
            raise InvalidInputError(
                "no distribution is known for this loss: it is neither softmax cross-entropy nor of a diagonal output "
                "Hessian. Use kind='empirical', or gauss_newton, which needs none"
            )
        return replace(found, root=root, rank=count * min(samples, width))

    return draw
