"""The Hessian of one layer: its form (T1), and where it equals the Gauss-Newton block (T1')."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnp_analysis.curvature import gauss_newton, hessian
from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.network import EmpiricalRisk, Layer, coverage, layer_rows
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.reference import channel_values
from bnp_analysis.theory.statements.rewriting import Offset, first_examples, rewritten, with_squared_outputs
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    agreement,
    distance,
    each_layer,
    label,
    statement,
)

_T1 = "a unit's Hessian block is H^^T S_i H^"
_LEMMA_8 = "the outputs of a convolution are H^ w^, a row [1, patch] per position"
_GN = "a unit's Gauss-Newton block is H^^T diag(s_i^2) H^"
_T1P = "a layer's Hessian block equals its Gauss-Newton block"
_BOUND = 1e-9
# Pre-activations of the layer whose second derivatives are formed.
_MOST_OFFSETS = 800


@statement(Source.PROP_2, _T1)
def check_dense_blocks(problem: Problem) -> Iterator[Check]:
    """Prop. 2: a dense layer's Hessian is made of its rows and of second derivatives by its pre-activations.

    `S` comes from a network with a free offset at the layer's output, the other side from the network itself.
    """
    yield from each_layer(problem, _T1, Source.PROP_2, _unit_blocks, dense=True)
    yield from each_layer(problem, _GN, Source.PROP_2, _by_rows, dense=True)


@statement(Source.PROP_9, _T1)
def check_convolution_blocks(problem: Problem) -> Iterator[Check]:
    """Lemma 8, Prop. 9: the outputs of a convolution are `H^ w^` with a row per position; its Hessian follows."""
    yield from each_layer(problem, _LEMMA_8, Source.PROP_9, _outputs, dense=False)
    yield from each_layer(problem, _T1, Source.PROP_9, _unit_blocks, dense=False)


def _outputs(problem: Problem, layer: Layer) -> Iterator[Check]:
    problem.require_once(layer)
    seen: list[Tensor] = []
    problem.risk.capture(lambda name, module, args, out: seen.append(out.clone()), [layer.name])
    found = torch.cat([channel_values(layer, out) for out in seen])
    tensors, rows = problem.risk.named_tensors(), problem.rows[layer.name]
    weight = tensors[layer.weight].flatten(1).view(layer.groups, -1, layer.features)
    expected = torch.einsum("rgm,gum->rgu", rows, weight).flatten(1)
    bias = tensors.get(f"{layer.name}.bias" if layer.name else "bias")
    yield agreement(
        f"{_LEMMA_8} [{label(layer)}]", Source.PROP_9, found, expected if bias is None else expected + bias,
        details={"rows": len(rows), "units": layer.units},
    )  # fmt: skip


def _by_rows(problem: Problem, layer: Layer) -> Iterator[Check]:
    """The short way to the blocks of dense units, one number per row, against the Jacobian of the network."""
    found = unit_blocks(problem.risk, problem.layers).get(layer.name)
    if found is None:
        raise NotApplicable("S_i is not one number per row: a convolution, a sequence, coupled or reused rows")
    short, long = [], []
    for i in problem.some_units(layer):
        A = gauss_newton(problem.risk, block=(layer.name, i))
        problem.require_size(A.dim)
        short.append(found[i].to_dense())
        long.append(A.to_dense())
    yield agreement(
        f"{_GN} [{label(layer)}]",
        Source.PROP_2,
        torch.stack(short),
        torch.stack(long),
        bound=resolution(problem.risk, layer.name),
        hypotheses={"dense": True},
    )


def _unit_blocks(problem: Problem, layer: Layer) -> Iterator[Check]:
    problem.require_smooth()
    problem.require_once(layer)
    risk = problem.risk
    per_example = _outputs_per_example(problem, layer)
    if per_example > _MOST_OFFSETS:
        raise NotApplicable(
            f"{per_example} pre-activations per example; dense second derivatives are formed of up to {_MOST_OFFSETS}"
        )
    part = rewritten(risk, batches=first_examples(risk, max(_MOST_OFFSETS // per_example, 1)))
    own = coverage(part)[layer.name]
    shapes: list[torch.Size] = []
    part.capture(lambda name, module, args, out: shapes.append(out.shape), [layer.name])
    with_offset = rewritten(part, {layer.name: lambda module: Offset(module, shapes[0], part.theta)})
    name = f"{layer.name}.offset" if layer.name else "offset"
    S = hessian(with_offset.restrict([name])).to_dense()
    rows = layer_rows(part)[layer.name]
    order = _by_unit(own, shapes[0])
    S = S[order][:, order].view(layer.units, rows.shape[0], layer.units, rows.shape[0])
    problem.require_size(layer.units * (layer.features + 1))
    A = hessian(part, block=layer.name).to_dense()
    hypotheses = {"covered": True, "one use of the weight": True, "no entry on a kink": True}
    yield agreement(
        f"the layer's Hessian block is (I (x) H^)^T S (I (x) H^) [{label(layer)}]",
        _source(layer),
        A,
        _assembled(own, rows, S),
        bound=resolution(part, layer.name),
        hypotheses=hypotheses,
        details={"rows": rows.shape[0], "units": layer.units, "examples": part.batches.total},
    )
    between = _between_examples(S, int(part.batches.total))
    if part.coupled:
        yield Check.not_applicable(
            f"S_i has no entries between examples [{label(layer)}]",
            _source(layer),
            f"examples are coupled by batch statistics; measured {between:.3g} of |S|",
        )
        return
    kind = "diagonal" if rows.shape[0] == part.batches.total else "block diagonal over examples"
    yield Check.compare(
        f"S_i is {kind} [{label(layer)}]",
        _source(layer),
        observed=between,
        predicted=1e-12,
        tolerance=0.0,
        relation="<=",
        hypotheses={"no batch coupling": True},
    )


def _source(layer: Layer) -> Source:
    return Source.PROP_9 if layer.spatial else Source.PROP_2


def _outputs_per_example(problem: Problem, layer: Layer) -> int:
    return problem.rows[layer.name].shape[0] * layer.units // max(round(problem.risk.batches.total), 1)


def _by_unit(layer: Layer, shape: torch.Size) -> Tensor:
    """The flat positions of an output, unit after unit, each in the order of the rows."""
    grid = torch.arange(shape.numel()).view(shape)
    return grid.movedim(layer.channel_axis, 0).reshape(-1)


def _assembled(layer: Layer, rows: Tensor, S: Tensor) -> Tensor:
    """`(I (x) H^)^T S (I (x) H^)` in torch's order: weights unit after unit, then the biases."""
    n, per_group = layer.units, layer.units // layer.groups
    H = [rows[:, i // per_group] for i in range(n)]
    m = layer.features
    A = rows.new_zeros(n * (m + 1), n * (m + 1))
    for i in range(n):
        for k in range(n):
            left = torch.cat([H[i], rows.new_ones(len(rows), 1)], dim=1)
            right = torch.cat([H[k], rows.new_ones(len(rows), 1)], dim=1)
            inner = left.T @ S[i, :, k] @ right
            A[i * m : (i + 1) * m, k * m : (k + 1) * m] = inner[:m, :m]
            A[i * m : (i + 1) * m, n * m + k] = inner[:m, m]
            A[n * m + i, k * m : (k + 1) * m] = inner[m, :m]
            A[n * m + i, n * m + k] = inner[m, m]
    return A if layer.bias is not None else A[: n * m, : n * m]


def _between_examples(S: Tensor, examples: int) -> float:
    """The part of `S` between different examples, relative."""
    each = max(S.shape[1] // max(examples, 1), 1)
    owner = torch.arange(S.shape[1]) // each
    across = (owner[:, None] != owner[None, :])[None, :, None, :]
    return float((S * across).norm() / S.norm()) if bool(S.any()) else 0.0


@statement(Source.T1_PRIME, _T1P)
def check_hessian_is_gauss_newton(problem: Problem) -> Iterator[Check]:
    """T1': with piecewise linear activations the two matrices agree on each layer, away from kinks."""
    yield from each_layer(problem, _T1P, Source.T1_PRIME, _equal_blocks)


def _equal_blocks(problem: Problem, layer: Layer) -> Iterator[Check]:
    found = problem.activations
    problem.require_once(layer)
    problem.require_smooth()
    bound = resolution(problem.risk, layer.name)
    H, A = problem.dense("hessian", layer.name), _by_factor(problem, layer)
    gap = distance(H, A)
    if not found.piecewise_linear:
        raise NotApplicable(f"not piecewise linear: {found.why_smooth}; the blocks differ by {gap:.3g} relative")
    if not bool(A.any()):
        raise NotApplicable("the layer has no curvature at all")
    hypotheses = {"piecewise linear": True, "no entry on a kink": True}
    yield agreement(f"{_T1P} [{label(layer)}]", Source.T1_PRIME, H, A, bound=bound, hypotheses=hypotheses)


def _by_factor(problem: Problem, layer: Layer) -> Tensor:
    """The Gauss-Newton block as `F^T F` from rows of the Jacobian, where the loss has a factor; else by products."""
    found = gauss_newton(problem.risk, block=layer.name)
    problem.require_size(found.dim)
    if found.factor is None:
        return found.to_dense()
    F = found.factor.to_dense()
    return F.T @ F


def resolution(risk: EmpiricalRisk, layer: str) -> float:
    """How well second derivatives by a layer are computed, relative: a saturated softmax leaves `p - p^2` to rounding.

    `u |J|^2 / |F|^2` with the Jacobian `J` by the layer and the factor `F`, in which the curvature keeps its digits.

    Raises:
        NotApplicable: nothing of them is left.
    """
    batch = next(iter(risk.batches))
    with torch.no_grad():
        outputs = risk.batch_outputs(risk.named_tensors(), batch)
    root = output_root(risk, batch, outputs, positions=True)
    F = gauss_newton(risk, block=layer).factor
    if root is None or root.probabilities is None or F is None:
        return _BOUND
    J = gauss_newton(with_squared_outputs(risk), block=layer).factor
    assert J is not None
    size = float(F.to_dense().square().sum())
    rounding = torch.finfo(risk.space.dtype).eps * float(J.to_dense().square().sum())
    if rounding > 1e-6 * size:
        share = size / rounding if rounding else 0.0
        raise NotApplicable(f"the softmax is saturated: the layer's curvature is {share:.2g} times its rounding")
    return max(_BOUND, 100 * rounding / size) if size else _BOUND
