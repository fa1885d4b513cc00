"""`P^T A P` is the Gauss-Newton matrix, and the Hessian, of the network written in the variables `z` (T2).

The network is written out anew here: its parameters are `z`, its weights `P z` by the formulas of T2 and T5, with
moments computed here from what enters each layer. Bugs that only this test catches: a consistent but wrong `P`
(sign of `mu`, missing `q`, features or groups of a convolution in another order than torch's patches, statistics of
another layer) obeys every law of a preconditioner and still is not BNP.
"""

from __future__ import annotations

import copy

import pytest
import torch
from precondition_networks import NETWORKS, network, relative
from torch import Tensor, nn

import bnp_analysis as bnp

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class InCoordinates(nn.Module):
    """A layer with parameters `z`: `w = z_w / (sigma q)`, `b = z_b / q - mu . w` for each unit.

    Without a bias `w = diag(1/sigma) (I + v v^T)^(-1/2) z / q` with `v = mu / sigma`. `mean` and `std` have the shape
    of the weight.
    """

    def __init__(self, layer: Layer, mean: Tensor, std: Tensor, q: float) -> None:
        super().__init__()
        self._forward = copy.deepcopy(layer).requires_grad_(False)
        self.mean, self.std, self.q = mean, std, q
        w = layer.weight.detach()
        if layer.bias is not None:
            self.weight = nn.Parameter(q * std * w)
            self.bias = nn.Parameter(q * (layer.bias.detach() + (mean * w).flatten(1).sum(dim=1)))
            return
        v = (mean / std).flatten(1)
        values, vectors = torch.linalg.eigh(torch.eye(v.shape[1]) + v.unsqueeze(2) * v.unsqueeze(1))
        self.root = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
        self.weight = nn.Parameter(q * torch.linalg.solve(self.root, (std * w).flatten(1).unsqueeze(2)).view_as(w))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            z = (self.root @ self.weight.flatten(1).unsqueeze(2)).view_as(self.weight)
            tensors = {"weight": z / (self.std * self.q)}
        else:
            w = self.weight / (self.std * self.q)
            tensors = {"weight": w, "bias": self.bias / self.q - (w * self.mean).flatten(1).sum(dim=1)}
        return torch.func.functional_call(self._forward, tensors, (x,))


def inputs_of(model: nn.Sequential, x: Tensor) -> list[tuple[int, Layer, Tensor]]:
    found = []
    for i, module in enumerate(model):
        if hasattr(module, "weight"):
            found.append((i, module, x.detach()))
        x = module(x)
    return found


def patches(layer: Layer, x: Tensor) -> Tensor:
    """`(R, channels, kernel...)`: the patch under the kernel at every output position, one by one."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    spans = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    starts = [
        range(0, size - span + 1, step) for size, span, step in zip(x.shape[2:], spans, layer.stride, strict=True)
    ]
    corners = torch.cartesian_prod(*(torch.tensor(s) for s in starts)).view(-1, len(starts)).tolist()
    return torch.cat(
        [
            x[
                (
                    slice(None),
                    slice(None),
                    *(slice(a, a + s, d) for a, s, d in zip(corner, spans, layer.dilation, strict=True)),
                )
            ]
            for corner in corners
        ]
    )


def per_weight(layer: Layer, per_patch: Tensor) -> Tensor:
    """Statistics of the patch `(channels, kernel...)`, in the shape of the weight: those of the unit's own group."""
    if isinstance(layer, nn.Linear):
        return per_patch.expand_as(layer.weight)
    size = layer.in_channels // layer.groups
    of_group = [per_patch[g * size : (g + 1) * size] for g in range(layer.groups)]
    return torch.stack([of_group[i * layer.groups // layer.out_channels] for i in range(layer.out_channels)])


def statistics(layer: Layer, x: Tensor, which: str) -> tuple[Tensor, Tensor, int]:
    """Mean and deviation in the shape of the weight, and the number of rows."""
    rows = patches(layer, x)
    values = rows
    if which == "channel" and not isinstance(layer, nn.Linear):
        values = x.movedim(1, -1).reshape(-1, x.shape[1])
    mean, std = values.mean(dim=0), (values - values.mean(dim=0)).square().mean(dim=0).sqrt()
    if mean.ndim < rows.ndim - 1:
        shape = (-1, *[1] * (rows.ndim - 2))
        mean, std = (s.view(shape).expand(rows.shape[1:]) for s in (mean, std))
    return per_weight(layer, mean), per_weight(layer, std), rows.shape[0]


def in_coordinates(model: nn.Sequential, x: Tensor, which: str) -> nn.Sequential:
    other = copy.deepcopy(model)
    for i, layer, seen in inputs_of(model, x):
        mean, std, rows = statistics(layer, seen, which)
        q = max(layer.weight[0].numel() / rows, 1.0) ** 0.5
        other[i] = InCoordinates(layer, mean, std, q)
    return other


def both(kind: str, bias: bool, which: str) -> tuple[bnp.EmpiricalRisk, bnp.EmpiricalRisk]:
    """The risk of a network and of the same network in the variables `z`."""
    model, x, y = network(kind, bias=bias)
    again = in_coordinates(model, x, which)
    torch.testing.assert_close(again(x), model(x), rtol=1e-10, atol=1e-10)
    loss = nn.functional.cross_entropy
    return bnp.EmpiricalRisk(model, loss, (x, y)), bnp.EmpiricalRisk(again, loss, (x, y))


# Each geometry once, with biases and statistics in turn; all four where there are groups.
CASES = [(kind, i % 2 == 0, ("channel", "patch")[i // 2 % 2]) for i, kind in enumerate(NETWORKS)]
CASES += [("groups", bias, which) for bias in (True, False) for which in ("channel", "patch")]


@pytest.mark.parametrize(("kind", "bias", "which"), sorted(set(CASES)))
def test_congruence_is_the_gauss_newton_matrix_of_the_network_in_z(kind: str, bias: bool, which: str) -> None:
    risk, in_z = both(kind, bias, which)
    P = bnp.bnp_preconditioner(risk, statistics=which)
    expected = bnp.gauss_newton(in_z).to_dense()
    found = bnp.linalg.congruence(bnp.gauss_newton(risk), P).to_dense()
    assert relative(found, expected) < 1e-10
    assert relative(P.apply(in_z.theta), risk.theta) < 1e-11, "theta = P z"
    assert relative(P.apply_transpose(risk.gradient), in_z.gradient) < 1e-10, "the gradient in z is P^T g"
    spectrum = torch.linalg.eigvalsh(found)
    assert float((spectrum - torch.linalg.eigvalsh(expected)).abs().max()) < 1e-11 * float(spectrum[-1])


@pytest.mark.parametrize("kind", ["dense", "groups"])
def test_congruence_is_the_hessian_of_the_network_in_z(kind: str) -> None:
    risk, in_z = both(kind, True, "channel")
    P = bnp.bnp_preconditioner(risk)
    assert relative(bnp.linalg.congruence(bnp.hessian(risk), P).to_dense(), bnp.hessian(in_z).to_dense()) < 1e-10


def test_small_batches_scale_by_q() -> None:
    """Both layers of this network see fewer rows than they have inputs, so `q > 1` is seen by the comparison above."""
    model, x, _ = network("dilation")
    rows = [statistics(layer, seen, "channel")[2] for _, layer, seen in inputs_of(model, x)]
    assert model[3].weight.shape[1] > rows[1]
    P = bnp.bnp_preconditioner(both("dilation", True, "channel")[0])
    assert P.q["3"] == (model[3].weight.shape[1] / rows[1]) ** 0.5 > 1


@pytest.mark.parametrize("kind", ["dense", "groups"])
def test_a_step_of_gradient_descent_in_z_is_a_preconditioned_step(kind: str) -> None:
    """`w <- w - alpha P P^T g` is gradient descent in `z`, and the forward pass is unchanged."""
    risk, in_z = both(kind, True, "channel")
    P = bnp.bnp_preconditioner(risk)
    alpha = 0.1
    ours = risk.at(risk.theta - alpha * P.direction(risk.gradient))
    theirs = in_z.at(in_z.theta - alpha * in_z.gradient)
    torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-10, atol=1e-10)
    assert float((ours.outputs - risk.outputs).abs().max()) > 1e-3


def test_splitting_the_data_into_uneven_batches_changes_nothing() -> None:
    model, x, y = network("groups")
    whole = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    split = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, [(x[:1], y[:1]), (x[1:5], y[1:5]), (x[5:], y[5:])])
    for options in ({}, {"statistics": "patch"}, {"q": "measured"}):
        one, many = (bnp.bnp_preconditioner(risk, **options).to_dense() for risk in (whole, split))
        assert relative(many, one) < 1e-13
