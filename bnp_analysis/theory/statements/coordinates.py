"""What the preconditioner is: a change of variables (T2), an update (T3), and its form without a bias (T5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.curvature import hessian
from bnp_analysis.linalg import MatrixOperator, congruence, singular_condition_number
from bnp_analysis.network import Layer, coverage
from bnp_analysis.precondition import BNPBlock, BNPPreconditioner, bnp_preconditioner
from bnp_analysis.runtime.random import normal
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.reference import block_of, damped, extended, first_unit, own_moments, scale
from bnp_analysis.theory.statements.rewriting import Affine, in_coordinates, rewritten
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, agreement, each_layer, label, statement

_T2 = "gradient descent in z = P^-1 theta multiplies gradients by P P^T"
_ROWS = "the rows of H^ P are those of G^ / q"
_T3 = "the update of a layer follows from its gradients, mu and sigma"
_T5 = "without a bias P P^T = (diag sigma^2 + mu mu^T)^-1 / q^2"
_EPS1 = 1e-2


@statement(Source.THEOREM_3, _T2)
def check_coordinates(problem: Problem) -> Iterator[Check]:
    """T2: the network as a function of `z`, differentiated through a dense `P`, against products with the operator."""
    problem.require_smooth()
    risk, P = problem.moving.risk, problem.P
    problem.require_size(risk.space.dim, "the dense P")
    in_z = in_coordinates(risk, P)
    dense = P.to_dense()
    more: dict[str, Any] = {"hypotheses": {"P is invertible": True}}
    yield agreement(
        "the forward pass is unchanged by theta = P z", Source.THEOREM_3, in_z.outputs, risk.outputs, **more
    )
    descent = dense @ in_z.gradient
    yield agreement(_T2, Source.THEOREM_3, P.direction(risk.gradient), descent, **more)
    v = normal((risk.space.dim, 4), problem.random(2), risk.theta)
    products = hessian(in_z) @ v
    yield agreement(
        "the Hessian in z is P^T A P",
        Source.THEOREM_3,
        congruence(hessian(risk), P) @ v,
        products,
        details={"vectors": 4},
        **more,
    )
    yield from each_layer(problem, _ROWS, Source.THEOREM_3, _normalized_rows)


def _normalized_rows(problem: Problem, layer: Layer) -> Iterator[Check]:
    block = block_of(problem.P, layer)
    assert isinstance(problem.P, BNPPreconditioner)
    settings = problem.P.settings
    if layer.bias is None:
        raise NotApplicable("the layer has no free bias: T5")
    if settings["q"] == "measured":
        raise NotApplicable("q is measured: T8")
    moments = own_moments(problem, layer, settings["statistics"])
    s2 = damped(moments, settings)
    rows = problem.rows[layer.name]
    rule, examples = settings["q"], int(problem.risk.batches.total)
    q = scale(layer, len(rows), rule, examples) if isinstance(rule, str) else float(rule)
    found, expected = [], []
    for group in range(layer.groups):
        P = block.unit(first_unit(layer, group)).to_dense()
        found.append(extended(rows[:, group], True) @ P)
        G = (rows[:, group] - moments.mean[group]) / s2[group].sqrt()
        expected.append(extended(G, True) / q)
    yield agreement(
        f"{_ROWS} [{label(layer)}]",
        Source.THEOREM_3,
        torch.cat(found),
        torch.cat(expected),
        hypotheses={"BNP": True, "bias": True},
        details={"q": q, "R": len(rows), "m": layer.features, "constant features": int(moments.constant.sum())},
    )


@statement(Source.ALGORITHM_2, _T3)
def check_update(problem: Problem) -> Iterator[Check]:
    """T3: the update, what `P P^T` is, what damping allows, and what the undamped step does not see."""
    yield from each_layer(problem, _T3, Source.ALGORITHM_2, _update)


def _update(problem: Problem, layer: Layer) -> Iterator[Check]:
    if layer.bias is None:
        raise NotApplicable("the layer has no free bias: T5")
    name = label(layer)
    moments = own_moments(problem, layer)
    s2 = damped(moments, {"eps1": 0, "eps2": 0})
    q = scale(layer, len(problem.rows[layer.name]))
    P = block_of(problem.bnp, layer)
    positions, _ = problem.bnp.blocks[layer.name]
    g = problem.risk.gradient[positions]
    if not bool(g.any()):
        g = normal((len(positions),), problem.random(3), problem.risk.theta)
    expected = _formula(g, layer, moments.mean, s2, q)
    yield agreement(f"{_T3} [{name}]", Source.ALGORITHM_2, P.direction(g), expected, details={"q": q})
    products, worst = [], 1.0
    for group in range(layer.groups):
        dense = P.unit(first_unit(layer, group)).to_dense()
        mu = torch.cat([moments.mean[group], moments.mean.new_ones(1)])
        M = torch.outer(mu, mu) + torch.diag(torch.cat([s2[group], s2.new_zeros(1)]))
        products.append(q * q * dense @ dense.T @ M)
        worst = max(worst, float(torch.linalg.cond(M)))
    eye = torch.eye(layer.features + 1, dtype=s2.dtype)
    bound = max(1e-9, 100 * torch.finfo(s2.dtype).eps * worst)
    words = f"undamped, P P^T is the inverse of the second moment with its covariance made diagonal [{name}]"
    yield agreement(words, Source.ALGORITHM_2, torch.cat(products), eye.repeat(layer.groups, 1), bound=bound)
    light = bnp_preconditioner(problem.risk, eps1=_EPS1).blocks[layer.name][1]
    assert isinstance(light, BNPBlock)
    spread = light.variance.max() / light.variance.min()
    yield Check.compare(
        f"damping bounds what is corrected: max s2 / min s2 [{name}]",
        Source.ALGORITHM_2,
        observed=float(spread),
        predicted=(1 + _EPS1) / _EPS1,
        tolerance=1e-12,
        relation="<=",
        details={"undamped": float(s2.max() / s2.min())},
    )
    yield from _invariance(problem.moving, layer)


def _formula(g: Tensor, layer: Layer, mean: Tensor, s2: Tensor, q: float) -> Tensor:
    """`Gw' = (Gw - Gb mu^T)/s2/q^2`, `Gb' = Gb/q^2 - Gw' mu`, unit by unit."""
    n, m = layer.units, layer.features
    weights, bias = g[: n * m].view(n, m), g[n * m :]
    owner = torch.arange(n) // (n // layer.groups)
    new = (weights - bias[:, None] * mean[owner]) / s2[owner] / q**2
    return torch.cat([new.reshape(-1), bias / q**2 - (new * mean[owner]).sum(dim=1)])


def _invariance(problem: Problem, layer: Layer) -> Iterator[Check]:
    """The undamped step in a network whose layer sees `D h + c`, carried back."""
    words = f"the undamped step does not see a per-feature map h -> D h + c [{label(layer)}]"
    constant = int(own_moments(problem, layer).constant.sum())
    if layer.pads_zeros:
        yield Check.not_applicable(words, Source.ALGORITHM_2, "zero padding: padded entries are not mapped")
        return
    if problem.activations.on_kink:
        yield Check.not_applicable(
            words, Source.ALGORITHM_2, f"{problem.activations.on_kink} pre-activations lie exactly on a kink"
        )
        return
    channels = layer.groups * layer.features // layer.patch
    g = problem.random(31)
    d = 10 ** (2 * torch.rand(channels, generator=g, dtype=torch.float64) - 1)
    c = 3 * torch.randn(channels, generator=g, dtype=torch.float64)
    # A constant feature has scale 1 whatever it is multiplied by: it may be shifted, not scaled.
    held = own_moments(problem, layer).constant.view(channels, layer.patch)[:, 0]
    d = torch.where(held, torch.ones_like(d), d)
    owner = torch.arange(layer.units) // (layer.units // layer.groups)
    D, C = (t.repeat_interleave(layer.patch).view(layer.groups, layer.features)[owner] for t in (d, c))

    def moved(own: nn.Module) -> nn.Module:
        with torch.no_grad():
            w = own.get_parameter("weight")
            w.copy_((w.flatten(1) / D).view_as(w))
            own.get_parameter("bias").sub_((w.flatten(1) * C).sum(dim=1))
        return nn.Sequential(Affine(d, c, layer.channel_axis), own)

    other = rewritten(problem.risk, {layer.name: moved})
    cut = layer.units * layer.features
    positions, _ = problem.bnp.blocks[layer.name]
    plain = problem.bnp.direction(problem.risk.gradient)[positions]
    theirs = bnp_preconditioner(other).direction(other.gradient)[positions]
    weights = theirs[:cut].view(layer.units, -1)
    back = torch.cat([(weights * D).reshape(-1), theirs[cut:] + (weights * C).sum(dim=1)])
    yield agreement(
        words,
        Source.ALGORITHM_2,
        back,
        plain,
        bound=1e-7,
        hypotheses={"undamped": True, "bias": True, "no zero padding": True},
        details={"D from": float(d.min()), "D to": float(d.max()), "constant features, not scaled": constant},
    )


@statement(Source.T5, _T5)
def check_without_bias(problem: Problem) -> Iterator[Check]:
    """T5: both forms, on every layer with its bias frozen."""
    weights = [layer.weight for layer in problem.layers]
    free = Problem(problem.risk.restrict(weights), seed=problem.seed, limit=problem.limit)
    yield from each_layer(free, _T5, Source.T5, _without_bias)


def _without_bias(problem: Problem, layer: Layer) -> Iterator[Check]:
    name = label(coverage(problem.risk)[layer.name])
    moments = own_moments(problem, layer)
    s2 = damped(moments, {"eps1": 0, "eps2": 0})
    rows = problem.rows[layer.name]
    R, q = len(rows), scale(layer, len(rows))
    block = block_of(problem.bnp, layer)
    diagonal = bnp_preconditioner(problem.risk, bias_free="diagonal").blocks[layer.name][1]
    assert isinstance(diagonal, BNPBlock)
    products, columns, kappas = [], [], {}
    rms = rows.square().mean(dim=0).sqrt() if layer.patch == 1 else (moments.variance + moments.mean**2).sqrt()
    worst = 1.0
    for group in range(layer.groups):
        first = first_unit(layer, group)
        P = block.unit(first).to_dense()
        M = torch.diag(s2[group]) + torch.outer(moments.mean[group], moments.mean[group])
        products.append(q * q * P @ P.T @ M)
        worst = max(worst, float(torch.linalg.cond(M)))
        D = diagonal.unit(first)
        columns.append(D.q * D.to_dense().diagonal() * rms[group])
        if group == 0:
            forms = {"raw": rows[:, 0], "diagonal": rows[:, 0] @ D.to_dense(), "rank-one": rows[:, 0] @ P}
            kappas = {f"kappa*, {form}": _kappa(matrix) for form, matrix in forms.items()}
    eye = torch.eye(layer.features, dtype=s2.dtype).repeat(layer.groups, 1)
    bound = max(1e-9, 100 * torch.finfo(s2.dtype).eps * worst)
    yield agreement(f"{_T5} [{name}]", Source.T5, torch.cat(products), eye, bound=bound, details=kappas)
    live = rms > 0
    norms = torch.stack(columns)[live]
    words = f"the diagonal form gives every column of H P the norm sqrt R / q [{name}]"
    yield agreement(words, Source.T5, norms, torch.ones_like(norms), details={"R": R})
    survives = torch.where(live, moments.mean**2 / rms.square().clamp_min(1e-300), torch.zeros_like(rms))
    yield Check.compare(
        f"its q^2 = max(m/R, 1) + sum_j mu_j^2 / rms_j^2 [{name}]",
        Source.T5,
        observed=diagonal.q**2,
        predicted=max(layer.features / R, 1.0) + float(survives.sum(dim=1).max()),
        tolerance=1e-9,
    )


def _kappa(matrix: Tensor) -> float:
    return singular_condition_number(MatrixOperator(matrix, exact=False)).value
