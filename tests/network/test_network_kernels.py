"""Products with a transposed Jacobian against torch's own function.

Only these tests catch a short cut that gives other numbers than `torch.autograd.grad`, or refuses other calls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bnp_analysis.network.kernels import vector_jacobian


def graph() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    return x.sin() * x, x, unused


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("fill", [False, True])
def test_products_are_those_of_torch(create: bool, fill: bool) -> None:
    out, x, unused = graph()
    u = torch.linspace(1, 2, 5, dtype=torch.float64)
    how: dict[str, Any] = {
        "retain_graph": True,
        "create_graph": create,
        "allow_unused": True,
        "materialize_grads": fill,
    }
    found, expected = (f(out, [x, unused], u, **how) for f in (vector_jacobian, torch.autograd.grad))
    assert torch.equal(found[0], expected[0])
    assert found[0].requires_grad == create
    assert (found[1] is None) == (expected[1] is None) == (not fill)
    if fill:
        assert torch.equal(found[1], expected[1])
        assert found[1].requires_grad == create  # in torch 2.9 the zeros always require one
    if create:
        second, reference = (torch.autograd.grad(t[0].sum(), x, retain_graph=True)[0] for t in (found, expected))
        assert torch.equal(second, reference)


def test_edges_scalars_and_wrong_shapes_are_as_in_torch() -> None:
    out, x, unused = graph()
    u, edge = torch.ones_like(out), get_gradient_edge(x)
    assert isinstance(edge, GradientEdge)
    assert torch.equal(
        vector_jacobian(out, edge, u, retain_graph=True)[0], vector_jacobian(out, x, u, retain_graph=True)[0]
    )
    assert torch.equal(
        vector_jacobian(out.sum(), x, retain_graph=True)[0], vector_jacobian(out, x, u, retain_graph=True)[0]
    )
    with pytest.raises(RuntimeError, match="shape"):
        vector_jacobian(out, x, torch.ones(3, dtype=torch.float64), retain_graph=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        vector_jacobian(out, unused, u)
