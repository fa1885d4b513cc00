"""The plain loop: one that depends on or disturbs global random numbers, skips the last examples, or hides divergence
is caught here."""

from __future__ import annotations

import signal

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.training import fit


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 3, generator=g, dtype=torch.float64)
    return x, x @ torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)


def test_one_epoch_is_the_hand_written_one():
    x, y = data()
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    twin = torch.nn.Linear(3, 1, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    loss = torch.nn.functional.mse_loss
    fit(model, loss, (x, y), epochs=1, batch_size=16, lr=0.1, momentum=0.0, seed=3)
    for rows in torch.randperm(50, generator=torch.Generator().manual_seed(3)).split(16):
        grads = torch.autograd.grad(loss(twin(x[rows]), y[rows]), list(twin.parameters()))
        with torch.no_grad():
            twin.weight -= 0.1 * grads[0]
            twin.bias -= 0.1 * grads[1]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_it_learns_keeps_the_mode_and_the_random_state():
    x, y = data()
    model = torch.nn.Linear(3, 1, dtype=torch.float64).eval()
    state = torch.get_rng_state()
    losses = fit(model, torch.nn.functional.mse_loss, (x, y), epochs=30)
    assert losses[-1] < 0.1 * losses[0]
    assert not model.training
    assert torch.equal(state, torch.get_rng_state())


def test_divergence_and_bad_sizes_are_errors():
    x, y = data()
    with pytest.raises(bnp.errors.NonFiniteError, match="learning rate"):
        fit(torch.nn.Linear(3, 1, dtype=torch.float64), torch.nn.functional.mse_loss, (x, y), epochs=200, lr=1e3)
    with pytest.raises(bnp.errors.InvalidInputError, match="batch_size=0"):
        fit(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, (x, y), batch_size=0)


def test_an_interrupt_is_one():
    x, y = data()
    model = torch.nn.Linear(3, 1, dtype=torch.float64)

    def loss(output, target):
        signal.raise_signal(signal.SIGINT)
        return torch.nn.functional.mse_loss(output, target)

    with pytest.raises(KeyboardInterrupt, match="SIGINT after step 1: nothing was saved"):
        fit(model, loss, (x, y))
