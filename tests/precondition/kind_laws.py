"""What every kind of layer must show: moments, `P`, T2, training, curvature, against rows formed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.network import Layer, coverage, layer_moments

# Layer name -> its rows, `(R, units, m)` or the same for all units, `(R, m)`; the gradients' names.
Rows = Mapping[str, Tensor]


def units_first(risk: bnp.EmpiricalRisk, layer: Layer, flat: Tensor) -> tuple[Tensor, Tensor | None]:
    """The part of a flat vector on a layer: weights `(units, m)` and bias `(units,)`."""
    tensors = risk.space.unflatten(flat)
    weight = layer.matrix(tensors[layer.weight]).reshape(layer.units, layer.features)
    return weight, None if layer.bias is None else tensors[layer.bias]


def expected_direction(weight: Tensor, bias: Tensor | None, rows: Tensor, q2: float) -> tuple[Tensor, Tensor | None]:
    """`P P^T g` of every unit by a solve with `[[diag s2 + mu mu^T, mu], [mu^T, 1]] q^2` (T2, T5), from the rows."""
    out_w, out_b = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    for i in range(len(weight)):
        h = rows if rows.ndim == 2 else rows[:, i]
        mu, s2 = h.mean(0), h.var(0, correction=0)
        M = torch.where(s2 > 0, s2, 1.0).diag() + torch.outer(mu, mu)
        g = weight[i]
        if bias is not None:
            M = torch.cat([torch.cat([M, mu[:, None]], 1), torch.cat([mu, mu.new_ones(1)])[None]])
            g = torch.cat([g, bias[i : i + 1]])
        solved = torch.linalg.solve(M, g) / q2
        out_w[i] = solved[: weight.shape[1]]
        if out_b is not None:
            out_b[i] = solved[-1]
    return out_w, out_b


def check_kind(
    make: Callable[[], nn.Module],
    x: Any,
    y: Tensor,
    rows: Callable[[nn.Module, Any], Rows],
    *,
    shared: Callable[[nn.Module, Any], Rows] | None = None,
    also: Iterable[type[nn.Module]] = (),
    curvature: bool = True,
) -> None:
    """All laws on one network.

    Args:
        make: the network, in float64.
        x, y: data with class labels.
        rows: what the parameters of every layer to look at meet, formed by hand from the network's own forward pass.
        shared: the rows of its inputs, where units make their own of them.
        also: types of layers that must be asked for.
        curvature: whether the loss has a curvature factor for its blocks.
    """
    model = make()
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
    expected = rows(model, x)
    P = bnp.bnp_preconditioner(risk, statistics="patch", also=also)
    layers = coverage(risk, also)
    found, inputs = (
        layer_moments(risk, statistics="patch", layers=layers),
        expected if shared is None else shared(model, x),
    )
    for name, h in expected.items():
        layer, m = layers[name], found[name]
        mean, variance = inputs[name].mean(0), inputs[name].var(0, correction=0)
        torch.testing.assert_close(
            m.mean.expand(-1, layer.features), grouped(mean, layer.groups), rtol=1e-12, atol=1e-13
        )
        torch.testing.assert_close(m.variance, grouped(variance, layer.groups), rtol=1e-11, atol=1e-13)
        assert m.rows == len(h)
        q2 = max(layer.features / len(h), 1.0)
        got = units_first(risk, layer, P.direction(risk.gradient))
        for a, b in zip(got, expected_direction(*units_first(risk, layer, risk.gradient), h, q2), strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    check_reparametrized(model, x, y, risk, P)
    check_training(make, x, y, expected, also)
    if curvature:
        check_curvature(risk, P, expected)


def grouped(values: Tensor, groups: int) -> Tensor:
    """`(units, m)` or `(m,)` as `(groups, m)`: all units of a group have the same rows."""
    if values.ndim == 1:
        return values.expand(groups, -1)
    return values.view(groups, -1, values.shape[1])[:, 0]


def check_reparametrized(
    model: nn.Module, x: Any, y: Tensor, risk: bnp.EmpiricalRisk, P: bnp.precondition.NetworkPreconditioner
) -> None:
    """T2: a step of plain gradient descent in `z`, `theta = P z`, is the preconditioned step in `theta`, to 1e-10."""
    dense = P.to_dense()
    z = torch.linalg.solve(dense, risk.theta).requires_grad_()
    named = risk.space.unflatten(dense @ z)
    loss = F.cross_entropy(torch.func.functional_call(model, named, (x,)), y)
    (in_z,) = torch.autograd.grad(loss, z)
    step = P.direction(risk.gradient)
    assert float((dense @ in_z - step).norm() / step.norm()) < 1e-10


def check_training(
    make: Callable[[], nn.Module], x: Any, y: Tensor, covered: Iterable[str], also: Iterable[type[nn.Module]]
) -> None:
    """Undamped, on full batches, without memory: `.grad` and moments are those of the exact risk at every step."""
    model = make()
    pre = bnp.BNP(model, rho=0.0, eps1=0.0, eps2=0.0, statistics="patch", also=also)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        risk = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
        plain = risk.space.flatten({n: p.grad.clone() for n, p in model.named_parameters() if n in risk.space})
        pre.step()
        exact = bnp.bnp_preconditioner(risk, statistics="patch", also=also)
        assert set(covered) <= set(pre.covered)
        assert set(pre.covered) == {layer.name for layer in coverage(risk, also)}
        got = risk.space.flatten({n: p.grad for n, p in model.named_parameters() if n in risk.space})
        expected = exact.direction(plain)
        assert float((got - expected).norm() / expected.norm()) < 1e-10
        mine = pre.preconditioner(risk.space)
        for name in exact.blocks:
            for part in ("mean", "variance"):
                a, b = (getattr(p.blocks[name][1], part) for p in (mine, exact))
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        optimizer.step()
    pre.close()


def check_curvature(risk: bnp.EmpiricalRisk, P: bnp.precondition.NetworkPreconditioner, names: Iterable[str]) -> None:
    """The factor of each layer's block is that of `J^T S J / N`; the table has the layer, with and without `P`."""
    model = next(module for name, module in risk.modules() if not name)
    batch = next(iter(risk.batches))

    def outputs(theta: Tensor) -> Tensor:
        return torch.func.functional_call(model, risk.space.unflatten(theta), (batch.x,))

    J = torch.autograd.functional.jacobian(outputs, risk.theta)
    p = outputs(risk.theta).detach().softmax(-1)
    S = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    whole = torch.einsum("nci,ncd,ndj->ij", J, S, J)
    table = {row.layer: row for row in bnp.layer_table(risk, P).layers}
    for name in names:
        A, own = bnp.gauss_newton(risk, block=name), risk.space.indices(name)
        block = whole[own][:, own]
        F_ = A.factor
        assert F_ is not None
        dense = F_.to_dense()
        torch.testing.assert_close(dense.T @ dense, block, rtol=1e-9, atol=1e-12 * float(block.abs().max()))
        row, Q = table[name], P.block(name).to_dense()
        for k, matrix in ((row.block, dense), (row.block_with_P, dense @ Q)):
            assert k is not None
            values = torch.linalg.svdvals(matrix)
            torch.testing.assert_close(float(values[0] / values[k.rank - 1]) ** 2, k.value, rtol=1e-4, atol=0.0)
