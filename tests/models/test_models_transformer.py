"""Catches: heads that mix, a residual branch without its input, patches in a wrong order or place, names that move,
and curvature products through attention that differ from differences of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis import models
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import coverage


def small(**options: Any) -> nn.Sequential:
    return models.transformer((2, 4, 6), 3, patch=2, width=6, depth=2, heads=2, hidden=5, **options)


def images(n: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def written(model: nn.Sequential, x: Tensor) -> Tensor:
    """The same network from sums and products, one token and one head at a time."""
    tokens = [
        torch.stack([image[:, i : i + 2, j : j + 2].reshape(-1) for i in (0, 2) for j in (0, 2, 4)]) for image in x
    ]
    h = model.patches.fc(torch.stack(tokens)) + model.patches.place
    for block in (model.block1, model.block2):
        inner, normal = block.attention.inner, block.attention.norm(h)
        q, k, v = (layer(normal) for layer in (inner.query, inner.key, inner.value))
        heads = []
        for part in (slice(0, 3), slice(3, 6)):
            scores = torch.einsum("nic,njc->nij", q[..., part], k[..., part]) / 3**0.5
            heads.append((scores.exp() / scores.exp().sum(dim=2, keepdim=True)) @ v[..., part])
        h = h + inner.out(torch.cat(heads, dim=2))
        perceptron = block.perceptron.inner
        h = h + perceptron.fc2(F.gelu(perceptron.fc1(block.perceptron.norm(h))))
    return model.fc(model.norm(h).mean(dim=1))


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_it_computes_what_it_says(norm: str) -> None:
    model = small(norm=norm, dtype=torch.float64)
    torch.testing.assert_close(model(images()), written(model, images()))


def test_names_and_sizes() -> None:
    model = small()
    assert list(dict(model.named_children())) == ["patches", "block1", "block2", "norm", "pool", "fc"]
    assert len([m for m in model.modules() if isinstance(m, nn.Linear)]) == 2 + 2 * 6
    assert all(m.bias is None for m in small(bias=False).modules() if isinstance(m, nn.Linear))


def test_the_seed_alone_decides() -> None:
    state = torch.get_rng_state()
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.patches.place, other.patches.place)


def test_curvature_products_through_it() -> None:
    """Against differences of gradients; every dense layer is covered by BNP."""
    risk = bnp.EmpiricalRisk(small(dtype=torch.float64), F.cross_entropy, (images(), torch.arange(5) % 3))
    v = torch.randn(risk.space.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-5
    difference = (risk.at(risk.theta + h * v).gradient - risk.at(risk.theta - h * v).gradient) / (2 * h)
    for engine in ("retained", "recompute"):
        found = bnp.hessian(risk, engine=engine) @ v
        assert float((found - difference).norm() / difference.norm()) <= 1e-7
    A = bnp.gauss_newton(risk)
    F_ = A.factor
    assert F_ is not None
    torch.testing.assert_close(F_.T @ (F_ @ v), A @ v)
    assert len(list(coverage(risk))) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (64,)}, "flatten=False"),
        ({"patch": 5}, "patch=5 does not divide images of 32 x 32"),
        ({"heads": 3}, "heads=3 does not divide width=64"),
        ({"depth": 0}, "depth"),
        ({"num_classes": 0}, "num_classes"),
        ({"input_shape": (3, 0, 8)}, "positive integer"),
        ({"norm": "batch"}, "'layer' or 'none'"),
        ({"norm_at": "preactivation"}, "norm_at='input'"),
        ({"activation": "swish"}, "known: relu"),
        ({"layers": 3}, "layers"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        models.build("transformer", **arguments)
