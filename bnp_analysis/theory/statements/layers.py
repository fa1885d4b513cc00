"""Layer by layer: the Hessian's form (T1, T1'), change of variables (T2), update (T3, T5), costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnp_analysis.curvature import gauss_newton, hessian
from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.linalg import congruence
from bnp_analysis.network import EmpiricalRisk, Layer, coverage, layer_rows
from bnp_analysis.precondition import BNPBlock, BNPPreconditioner, bnp_preconditioner
from bnp_analysis.runtime.random import normal
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.setting import (
    Affine,
    NotApplicable,
    Offset,
    Problem,
    agreement,
    at_most,
    block_of,
    channel_axis,
    channel_values,
    channels,
    dense,
    distance,
    equals,
    extended,
    first_examples,
    in_coordinates,
    of_group,
    own_moments,
    passing,
    per_entry,
    per_layer,
    per_unit,
    refused,
    rewritten,
    scale,
    singular,
    statement,
    zero_padded,
)

_T1 = "a unit's Hessian block is H^^T S_i H^"
_LEMMA_8 = "the outputs of a convolution are H^ w^, a row [1, patch] per position"
_GN = "a unit's Gauss-Newton block is H^^T diag(s_i^2) H^"
_T1P = "a layer's Hessian block equals its Gauss-Newton block"
_BOUND = 1e-9
# Pre-activations of the layer whose second derivatives are formed.
_MOST_OFFSETS = 800
_T2 = "gradient descent in z = P^-1 theta multiplies gradients by P P^T"
_ROWS = "the rows of H^ P are those of G^ / q"
_T3 = "the update of a layer follows from its gradients, mu and sigma"
_SECOND_MOMENT = "undamped, P P^T is the inverse of the second moment with its covariance made diagonal"
_INVARIANT = "the undamped step does not see a per-feature map h -> D h + c"
_T5 = "without a bias P P^T = (diag sigma^2 + mu mu^T)^-1 / q^2"
_PROP_6 = "a dense step costs 4nN + 6 n n_out + 2 n_out + 8n operations"
# (n, n_out, N)
_SIZES = ((3, 2, 4), (5, 7, 2), (4, 1, 9), (2, 6, 3))
_EPS1, _EPS2, _RHO = 1e-2, 1e-4, 0.99


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


@statement(Source.THEOREM_3, _T2)
def check_coordinates(problem: Problem) -> Iterator[Check]:
    """T2: the network as a function of `z`, differentiated through a dense `P`, against products with the operator."""
    problem.require_smooth()
    risk, P = problem.moving.risk, problem.P
    problem.require_size(risk.space.dim, "the dense P")
    in_z, given = in_coordinates(risk, P), ("P is invertible",)
    yield agreement("the forward pass is unchanged by theta = P z", in_z.outputs, risk.outputs, given=given)
    yield agreement(_T2, P.direction(risk.gradient), P.to_dense() @ in_z.gradient, given=given)
    v = normal((risk.space.dim, 4), problem.random(2), risk.theta)
    found, expected = congruence(hessian(risk), P) @ v, hessian(in_z) @ v
    yield agreement("the Hessian in z is P^T A P", found, expected, details={"vectors": 4}, given=given)
    yield from _normalized_rows(problem)


@per_layer(_ROWS)
def _normalized_rows(problem: Problem, layer: Layer) -> Iterator[Check]:
    block = block_of(problem.P, layer)
    assert isinstance(problem.P, BNPPreconditioner)
    settings = problem.P.settings
    if layer.bias is None:
        raise NotApplicable("the layer has no free bias: T5")
    if settings["q"] == "measured":
        raise NotApplicable("q is measured: T8")
    moments = own_moments(problem, layer, settings["statistics"])
    rows = problem.rows[layer.name]
    rule, examples = settings["q"], int(problem.risk.batches.total)
    q = scale(layer, len(rows), rule, examples) if isinstance(rule, str) else float(rule)
    G = (rows - moments.mean) / moments.damped(settings["eps1"], settings["eps2"]).sqrt()
    groups = range(layer.groups)
    yield agreement(
        _ROWS,
        torch.cat([extended(rows[:, group]) @ of_group(block, layer, group) for group in groups]),
        torch.cat([extended(G[:, group]) / q for group in groups]),
        given=("BNP", "bias"),
        details={"q": q, "R": len(rows), "m": layer.features, "constant features": int(moments.constant.sum())},
    )


@statement(Source.ALGORITHM_2, _T3)
@per_layer(_T3)
def check_update(problem: Problem, layer: Layer) -> Iterator[Check]:
    """T3: the update, what `P P^T` is, what damping allows, and what the undamped step does not see."""
    if layer.bias is None:
        raise NotApplicable("the layer has no free bias: T5")
    moments = own_moments(problem, layer)
    s2, q = moments.damped(), scale(layer, len(problem.rows[layer.name]))
    P = block_of(problem.bnp, layer)
    g = problem.risk.gradient[problem.bnp.blocks[layer.name][0]]
    if not bool(g.any()):
        g = normal((len(g),), problem.random(3), problem.risk.theta)
    yield agreement(_T3, P.direction(g), _formula(g, layer, moments.mean, s2, q), details={"q": q})
    zero, one = s2.new_zeros(layer.groups, 1), s2.new_ones(layer.groups, 1)
    yield _inverse(_SECOND_MOMENT, P, layer, torch.cat([moments.mean, one], 1), torch.cat([s2, zero], 1), q)
    light = bnp_preconditioner(problem.risk, eps1=_EPS1).blocks[layer.name][1]
    assert isinstance(light, BNPBlock)
    yield at_most(
        "damping bounds what is corrected: max s2 / min s2",
        float(light.variance.max() / light.variance.min()),
        (1 + _EPS1) / _EPS1,
        tolerance=1e-12,
        details={"undamped": float(s2.max() / s2.min())},
    )
    yield _invariance(problem.moving, layer)


def _formula(g: Tensor, layer: Layer, mean: Tensor, s2: Tensor, q: float) -> Tensor:
    """`Gw' = (Gw - Gb mu^T)/s2/q^2`, `Gb' = Gb/q^2 - Gw' mu`, unit by unit."""
    cut, mu = layer.units * layer.features, per_unit(mean, layer)
    weights, bias = g[:cut].view(layer.units, -1), g[cut:]
    new = (weights - bias[:, None] * mu) / per_unit(s2, layer) / q**2
    return torch.cat([new.reshape(-1), bias / q**2 - (new * mu).sum(dim=1)])


def _inverse(
    words: str, P: BNPBlock, layer: Layer, mean: Tensor, s2: Tensor, q: float, details: dict[str, Any] | None = None
) -> Check:
    """Whether `q^2 P P^T` is the inverse of `mu mu^T + diag s2` in every group."""
    products, worst = [], 1.0
    for group in range(layer.groups):
        D = of_group(P, layer, group)
        M = torch.outer(mean[group], mean[group]) + torch.diag(s2[group])
        products.append(q * q * D @ D.T @ M)
        worst = max(worst, float(torch.linalg.cond(M)))
    eye = torch.eye(s2.shape[1], dtype=s2.dtype).repeat(layer.groups, 1)
    bound = max(1e-9, 100 * torch.finfo(s2.dtype).eps * worst)
    return agreement(words, torch.cat(products), eye, bound=bound, details=details or {})


def _invariance(problem: Problem, layer: Layer) -> Check:
    """The undamped step in a network whose layer sees `D h + c`, carried back."""
    if zero_padded(layer):
        return refused(_INVARIANT, "zero padding: padded entries are not mapped")
    if problem.activations.on_kink:
        return refused(_INVARIANT, f"{problem.activations.on_kink} pre-activations lie exactly on a kink")
    g, count, moments = problem.random(31), channels(layer), own_moments(problem, layer)
    held = moments.constant
    d = 10 ** (2 * torch.rand(count, generator=g, dtype=torch.float64) - 1)
    # In deviations: a larger shift of small features would leave their digits to rounding.
    deviations = moments.damped().sqrt().view(count, layer.patch)[:, 0]
    c = 3 * torch.randn(count, generator=g, dtype=torch.float64) * deviations
    # A constant feature has scale 1 whatever it is multiplied by: it may be shifted, not scaled.
    d = torch.where(held.view(count, layer.patch)[:, 0], torch.ones_like(d), d)
    D, C = (per_unit(per_entry(t, layer), layer) for t in (d, c))

    def moved(own: nn.Module) -> nn.Module:
        with torch.no_grad():
            w = own.get_parameter("weight")
            w.copy_((w.flatten(1) / D).view_as(w))
            own.get_parameter("bias").sub_((w.flatten(1) * C).sum(dim=1))
        return nn.Sequential(Affine(d, c, channel_axis(layer)), own)

    other = rewritten(problem.risk, {layer.name: moved})
    positions, cut = problem.bnp.blocks[layer.name][0], layer.units * layer.features
    theirs = bnp_preconditioner(other).direction(other.gradient)[positions]
    weights = theirs[:cut].view(layer.units, -1)
    return agreement(
        _INVARIANT,
        torch.cat([(weights * D).reshape(-1), theirs[cut:] + (weights * C).sum(dim=1)]),
        problem.bnp.direction(problem.risk.gradient)[positions],
        bound=1e-7,
        given=("undamped", "bias", "no zero padding"),
        details={
            "D from": float(d.min()),
            "D to": float(d.max()),
            "constant features, not scaled": int(held.sum()),
        },
    )


@statement(Source.T5, _T5)
def check_without_bias(problem: Problem) -> Iterator[Check]:
    """T5: both forms, on every layer with its bias frozen."""
    weights = [layer.weight for layer in problem.layers]
    yield from _without_bias(problem.of(problem.risk.restrict(weights)))


@per_layer(_T5)
def _without_bias(problem: Problem, layer: Layer) -> Iterator[Check]:
    moments, rows = own_moments(problem, layer), problem.rows[layer.name]
    P = block_of(problem.bnp, layer)
    diagonal = bnp_preconditioner(problem.risk, bias_free="diagonal").blocks[layer.name][1]
    assert isinstance(diagonal, BNPBlock)
    forms = {"raw": rows[:, 0], "diagonal": rows[:, 0] @ of_group(diagonal, layer, 0)}
    forms["rank-one"] = rows[:, 0] @ of_group(P, layer, 0)
    kappas = {f"kappa*, {form}": singular(matrix).value for form, matrix in forms.items()}
    yield _inverse(_T5, P, layer, moments.mean, moments.damped(), scale(layer, len(rows)), kappas)
    rms = rows.square().mean(dim=0).sqrt() if layer.patch == 1 else (moments.variance + moments.mean**2).sqrt()
    live = rms > 0
    columns = torch.stack([of_group(diagonal, layer, group).diagonal() for group in range(layer.groups)])
    norms = (diagonal.q * columns * rms)[live]
    words = "the diagonal form gives every column of H P the norm sqrt R / q"
    yield agreement(words, norms, torch.ones_like(norms), details={"R": len(rows)})
    survives = torch.where(live, moments.mean / rms, torch.zeros_like(rms)).square()
    expected = max(layer.features / len(rows), 1.0) + float(survives.sum(dim=1).max())
    yield equals("its q^2 = max(m/R, 1) + sum_j mu_j^2 / rms_j^2", diagonal.q**2, expected, tolerance=1e-9)


class Counting(TorchFunctionMode):
    """Counts the additions, multiplications, divisions, comparisons and roots of tensors meanwhile, entry by entry."""

    operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.__name__.strip("_")
        if name in ("add", "sub", "mul", "div", "truediv", "pow"):
            self.operations += made.numel()
        elif name in ("sum", "amax"):
            self.operations += args[0].numel() - made.numel()
        return made


def _statistics(H: Tensor, mu: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The differences from the mean of the batch, and its variance; running statistics are changed in place."""
    mean = H.sum(dim=0) / len(H)
    apart = H - mean
    variance = (apart * apart).sum(dim=0) / len(H)
    mu[:] = mu * _RHO + mean * (1 - _RHO)
    var[:] = var * _RHO + variance * (1 - _RHO)
    return apart, variance


def algorithm_2(H: Tensor, Gw: Tensor, Gb: Tensor, mu: Tensor, var: Tensor, q2: float) -> tuple[Tensor, Tensor]:
    """One dense step of Algorithm 2, written out, with running statistics `mu`, `var` (changed in place).

    Args:
        H: the inputs, `(N, n)`.
        Gw, Gb: the gradients, `(n_out, n)` and `(n_out,)`.
        mu, var: running mean and variance, `(n,)`.
        q2: `q^2`.

    Returns:
        The preconditioned gradients.

    Source: Lange, Helfrich and Ye 2022, Algorithm 2 (p. 11).
    """
    _statistics(H, mu, var)
    s2 = var + (var.amax() * _EPS1 + _EPS2)
    new = (Gw - mu * Gb[:, None]) / s2 / q2
    return new, Gb / q2 - (new * mu).sum(dim=1)


def batch_norm(H: Tensor, dY: Tensor, gain: Tensor, offset: Tensor, mu: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward pass of batch normalization, written out, with running statistics: its outputs and `dH`."""
    apart, variance = _statistics(H, mu, var)
    sigma = (variance + _EPS2) ** 0.5
    hat = apart / sigma
    d_offset, d_gain = dY.sum(dim=0), (dY * hat).sum(dim=0)
    dH = (dY - d_offset / len(H) - hat * (d_gain / len(H))) * (gain / sigma)
    return hat * gain + offset, dH


def formula(n: int, n_out: int, N: int) -> int:
    """The paper's number of operations of one dense step."""
    return 4 * n * N + 6 * n * n_out + 2 * n_out + 8 * n


@statement(Source.PROP_6, _PROP_6)
def check_cost(problem: Problem) -> Iterator[Check]:
    """Prop. 6: at a few sizes, that the counted algorithm is the package's update, and BN's count."""
    g, steps, norms = problem.random(6), [], []
    for n, n_out, N in _SIZES:
        shapes: Sequence[tuple[int, ...]] = ((N, n), (N, n), (n_out, n), (n_out,), *[(n,)] * 4)
        drawn = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
        drawn[5] = drawn[5] ** 2
        H, dY, Gw, Gb, mu, var, gain, offset = drawn
        q2 = max(n / N, 1.0)
        with Counting() as step:
            new = algorithm_2(H, Gw, Gb, mu, var, q2)
        steps.append((step.operations, formula(n, n_out, N), n_out))
        block = BNPBlock(mu[None], (var + _EPS1 * var.max() + _EPS2)[None], q2**0.5, units=n_out, bias=True)
        expected = block.direction(torch.cat([Gw.flatten(), Gb]))
        words = f"what is counted is the update [n = {n}, n_out = {n_out}, N = {N}]"
        yield agreement(words, torch.cat([part.flatten() for part in new]), expected, bound=1e-12)
        with Counting() as norm:
            batch_norm(H, dY, gain, offset, mu, var)
        norms.append((norm.operations, 32 * n * N + 4 * n, n * N))
    yield equals(
        f"{_PROP_6}; counted, n_out - 1 fewer [the largest difference at {len(_SIZES)} sizes]",
        float(max(abs(paper - count - (n_out - 1)) for count, paper, n_out in steps)),
        0.0,
        details={"counted": [one[0] for one in steps], "the formula": [one[1] for one in steps]},
    )
    yield at_most(
        "BN costs at most 32 nN + 4n operations, and not so many [the largest ratio]",
        max(count / paper for count, paper, _ in norms),
        1.0,
        details={"counted over nN": [count / nN for count, _, nN in norms]},
    )
    yield from _own_cost(problem)


@per_layer(_PROP_6)
def _own_cost(problem: Problem, layer: Layer) -> Iterator[Check]:
    """What the formula says of a layer: numbers, no verdict."""
    if not dense(layer):
        raise NotApplicable("the count is of dense layers")
    n, n_out, N = layer.features, layer.units, len(problem.rows[layer.name])
    ours, theirs = formula(n, n_out, N), 32 * n * N + 4 * n
    why = f"n = {n}, n_out = {n_out}, N = {N}: {ours:,} operations by the formula, BN {theirs:,}"
    yield refused(_PROP_6, why)
