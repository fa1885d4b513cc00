"""The Hessian of one layer: its form (T1), and where it equals the Gauss-Newton block (T1')."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnp_analysis.curvature import gauss_newton, hessian
from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.network import EmpiricalRisk, Layer, coverage, layer_rows
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Offset,
    Problem,
    agreement,
    at_most,
    channel_axis,
    channel_values,
    dense,
    distance,
    extended,
    first_examples,
    passing,
    per_layer,
    refused,
    rewritten,
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
    yield from per_layer(_T1, only=dense)(_unit_blocks)(problem)
    yield from _by_rows(problem)


@statement(Source.PROP_9, _T1)
def check_convolution_blocks(problem: Problem) -> Iterator[Check]:
    """Lemma 8, Prop. 9: the outputs of a convolution are `H^ w^` with a row per position; its Hessian follows."""
    yield from _outputs(problem)
    yield from per_layer(_T1, only=lambda layer: not dense(layer))(_unit_blocks)(problem)


@per_layer(_LEMMA_8, only=lambda layer: not dense(layer))
def _outputs(problem: Problem, layer: Layer) -> Iterator[Check]:
    problem.require_once(layer)
    found = torch.cat([channel_values(layer, out) for _, out in passing(problem.risk, layer.name)])
    tensors, rows = problem.risk.named_tensors(), problem.rows[layer.name]
    weight = tensors[layer.weight].flatten(1).view(layer.groups, -1, layer.features)
    expected = torch.einsum("rgm,gum->rgu", rows, weight).flatten(1)
    bias = tensors.get(f"{layer.name}.bias" if layer.name else "bias")
    expected = expected if bias is None else expected + bias
    yield agreement(_LEMMA_8, found, expected, details={"rows": len(rows), "units": layer.units})


@per_layer(_GN, only=dense)
def _by_rows(problem: Problem, layer: Layer) -> Iterator[Check]:
    """The short way to the blocks of dense units, one number per row, against the Jacobian of the network."""
    found = unit_blocks(problem.risk, problem.layers).get(layer.name)
    if found is None:
        raise NotApplicable("S_i is not one number per row: a convolution, a sequence, coupled or reused rows")
    units = problem.some_units(layer)
    long = torch.stack([problem.dense(gauss_newton, (layer.name, i)) for i in units])
    short = torch.stack([found[i].to_dense() for i in units])
    yield agreement(_GN, short, long, bound=resolution(problem.risk, layer.name), given=("dense",))


def _unit_blocks(problem: Problem, layer: Layer) -> Iterator[Check]:
    problem.require_smooth()
    problem.require_once(layer)
    risk = problem.risk
    per_example = problem.rows[layer.name].shape[0] * layer.units // max(round(risk.batches.total), 1)
    if per_example > _MOST_OFFSETS:
        raise NotApplicable(
            f"{per_example} pre-activations per example; dense second derivatives are formed of up to {_MOST_OFFSETS}"
        )
    part = rewritten(risk, batches=first_examples(risk, max(_MOST_OFFSETS // per_example, 1)))
    own, rows = coverage(part)[layer.name], layer_rows(part)[layer.name]
    shape = passing(part, layer.name)[0][1].shape
    with_offset = rewritten(part, {layer.name: lambda module: nn.Sequential(module, Offset(shape, part.theta))})
    name = f"{layer.name}.1.offset" if layer.name else "1.offset"
    # Pre-activations unit after unit, each in the order of the rows.
    order = torch.arange(shape.numel()).view(shape).movedim(channel_axis(layer), 0).reshape(-1)
    S = hessian(with_offset.restrict([name])).to_dense()[order][:, order]
    S = S.view(layer.units, rows.shape[0], layer.units, rows.shape[0])
    problem.require_size(layer.units * (layer.features + 1))
    yield agreement(
        "the layer's Hessian block is (I (x) H^)^T S (I (x) H^)",
        hessian(part, block=layer.name).to_dense(),
        _assembled(own, rows, S),
        bound=resolution(part, layer.name),
        given=("covered", "one use of the weight", "no entry on a kink"),
        details={"rows": rows.shape[0], "units": layer.units, "examples": part.batches.total},
    )
    between = _between_examples(S, int(part.batches.total))
    if part.coupled:
        why = f"examples are coupled by batch statistics; measured {between:.3g} of |S|"
        yield refused("S_i has no entries between examples", why)
        return
    kind = "diagonal" if rows.shape[0] == part.batches.total else "block diagonal over examples"
    yield at_most(f"S_i is {kind}", between, 1e-12, given=("no batch coupling",))


def _assembled(layer: Layer, rows: Tensor, S: Tensor) -> Tensor:
    """`(I (x) H^)^T S (I (x) H^)` in torch's order: weights unit after unit, then the biases."""
    n, m = layer.units, layer.features
    H = [extended(rows[:, i // (n // layer.groups)]) for i in range(n)]
    A = torch.stack([torch.stack([H[i].T @ S[i, :, k] @ H[k] for k in range(n)]) for i in range(n)])
    # (unit, unit, entry, entry) -> weights before biases
    A = A.permute(0, 2, 1, 3).reshape(n * (m + 1), n * (m + 1))
    place = torch.arange(n * (m + 1)).view(n, m + 1)
    order = torch.cat([place[:, :m].reshape(-1), place[:, m]]) if layer.bias is not None else place[:, :m].reshape(-1)
    return A[order][:, order]


def _between_examples(S: Tensor, examples: int) -> float:
    """The part of `S` between different examples, relative."""
    each = max(S.shape[1] // max(examples, 1), 1)
    owner = torch.arange(S.shape[1]) // each
    across = (owner[:, None] != owner[None, :])[None, :, None, :]
    return float((S * across).norm() / S.norm()) if bool(S.any()) else 0.0


@statement(Source.T1_PRIME, _T1P)
@per_layer(_T1P)
def check_hessian_is_gauss_newton(problem: Problem, layer: Layer) -> Iterator[Check]:
    """T1': with piecewise linear activations the two matrices agree on each layer, away from kinks."""
    problem.require_once(layer)
    problem.require_smooth()
    bound = resolution(problem.risk, layer.name)
    H, A = problem.dense(hessian, layer.name), _by_factor(problem, layer)
    smooth = ", ".join(f"{name} ({count})" for name, count in problem.activations.smooth.items())
    if smooth:
        raise NotApplicable(f"not piecewise linear: {smooth}; the blocks differ by {distance(H, A):.3g} relative")
    if not bool(A.any()):
        raise NotApplicable("the layer has no curvature at all")
    yield agreement(_T1P, H, A, bound=bound, given=("piecewise linear", "no entry on a kink"))


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
    # Of the loss |f|^2/2 the curvature in the outputs is the identity.
    squared = rewritten(risk, loss=lambda outputs, y: outputs.square().flatten(1).sum(dim=1).mean() / 2)
    J = gauss_newton(squared, block=layer).factor
    assert J is not None
    size, of_layer = (sum(float(rows.square().sum()) for rows in factor.row_blocks()) for factor in (F, J))
    rounding = torch.finfo(risk.space.dtype).eps * of_layer
    if rounding > 1e-6 * size:
        share = size / rounding if rounding else 0.0
        raise NotApplicable(f"the softmax is saturated: the layer's curvature is {share:.2g} times its rounding")
    return max(_BOUND, 100 * rounding / size) if size else _BOUND
