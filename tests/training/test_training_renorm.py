"""Batch Renormalization: limits that are swapped or never grow, a gradient through `r` or `d`, statistics updated
before they are compared, the unbiased variance, and an evaluation that is not BatchNorm's are caught only here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bnp_analysis import models
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.parts import BatchRenorm

DOUBLE = torch.float64


def layer(mean: Tensor, std: Tensor, steps: int = 0, **options) -> BatchRenorm:
    """A layer with given running statistics that has seen `steps` batches."""
    norm = BatchRenorm(len(mean), **options).to(DOUBLE)
    norm.running_mean.copy_(mean)
    norm.running_std.copy_(std)
    norm.num_batches_tracked.fill_(steps)
    return norm


def images(generator: torch.Generator, *shape: int) -> Tensor:
    return 2 + 3 * torch.randn(shape, generator=generator, dtype=DOUBLE)


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 2, 5)])
def test_without_clipping_training_equals_evaluation(generator, shape):
    x = images(generator, *shape)
    mean, std = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE), torch.tensor([2.0, 4.0, 3.0], dtype=DOUBLE)
    norm = layer(mean, std, steps=1, warmup=1, ramp=(1, 1), r_max=1e6, d_max=1e6)
    trained = norm(x)
    norm.running_mean.copy_(mean)
    norm.running_std.copy_(std)
    torch.testing.assert_close(trained, norm.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 2, 5)])
def test_evaluation_is_that_of_batch_norm(generator, shape):
    x = images(generator, *shape)
    mean, std = torch.tensor([1.0, 2.0, -1.0], dtype=DOUBLE), torch.tensor([2.0, 4.0, 3.0], dtype=DOUBLE)
    norm = layer(mean, std).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    expected = F.batch_norm(x, mean, std**2 - norm.eps, norm.weight, norm.bias, eps=norm.eps)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(norm.running_mean, mean)


def test_r_and_d_are_clipped_on_both_sides_and_are_constants_of_the_backward_pass(generator):
    x = images(generator, 9, 4).requires_grad_()
    mean = torch.tensor([2.0, 2.0, 90.0, -90.0], dtype=DOUBLE)
    std = torch.tensor([1e-3, 1e3, 1.0, 3.0], dtype=DOUBLE)
    norm = layer(mean, std, steps=1, warmup=1, ramp=(1, 1), r_max=2.0, d_max=0.5, affine=False)
    out = norm(x)
    m, s = x.mean(0), (x.var(0, correction=0) + norm.eps).sqrt()
    r = torch.tensor([2.0, 0.5, 0.0, 0.0], dtype=DOUBLE)
    r[2:] = (s[2:] / std[2:]).clamp(0.5, 2).detach()
    d = ((m - mean) / std).clamp(-0.5, 0.5).detach()
    assert d[2] == -0.5
    assert d[3] == 0.5
    expected = (x - m) / s * r + d
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(9, 4, generator=generator, dtype=DOUBLE)
    found, wanted = (torch.autograd.grad(z, x, direction)[0] for z in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_warm_up_is_batch_norm_and_limits_grow_linearly(generator):
    x = images(generator, 9, 3)
    norm = BatchRenorm(3, warmup=5, ramp=(15, 10), r_max=3.0, d_max=5.0).to(DOUBLE)
    for _ in range(5):
        torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True), rtol=1e-12, atol=1e-12)
    seen = []
    for steps in (4, 5, 9, 10, 14, 99):
        norm.num_batches_tracked.fill_(steps)
        seen.append([float(limit) for limit in norm.limits()])
    assert seen == [
        [1.0, 0.0],
        [pytest.approx(1.2), pytest.approx(1.0)],
        [pytest.approx(2.0), pytest.approx(5.0)],
        [pytest.approx(2.2), pytest.approx(5.0)],
        [pytest.approx(3.0), pytest.approx(5.0)],
        [3.0, 5.0],
    ]


def test_running_statistics_are_plain_averages_first_and_exponential_ones_then(generator):
    norm = BatchRenorm(2, momentum=0.25).to(DOUBLE)
    batches = [images(generator, 6, 2) for _ in range(5)]
    for x in batches:
        norm(x)
    means = torch.stack([x.mean(0) for x in batches])
    stds = torch.stack([(x.var(0, correction=0) + norm.eps).sqrt() for x in batches])
    for running, values in ((norm.running_mean, means), (norm.running_std, stds)):
        torch.testing.assert_close(running, 0.75 * values[:4].mean(0) + 0.25 * values[4])


def test_networks_take_it_by_name_and_train_with_it(generator):
    model = models.cnn((1, 8, 8), channels=(2, 3, 4), hidden=5, norm="renorm", norm_at="input")
    assert sum(isinstance(m, BatchRenorm) for m in model.modules()) == 5
    F.cross_entropy(model(torch.rand(6, 1, 8, 8, generator=generator)), torch.arange(6)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.norm4.num_batches_tracked == 1


def test_bad_input_is_refused():
    with pytest.raises(InvalidInputError, match="more than one value per channel"):
        BatchRenorm(3)(torch.ones(1, 3))
    with pytest.raises(InvalidInputError, match=r"\(N, 3, ...\)"):
        BatchRenorm(3)(torch.ones(4, 2))
    with pytest.raises(InvalidInputError, match="r_max"):
        BatchRenorm(3, r_max=0.5)
    assert BatchRenorm(3).eval()(torch.ones(1, 3)).shape == (1, 3)
