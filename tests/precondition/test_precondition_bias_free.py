"""Layers without a bias, where nothing can be centred: the rank-one form and the diagonal one (T5).

Bugs that only these tests catch: the mean direction of a layer without bias scaled as if it had been centred away, a
wrong exponent in the rank-one correction, a frozen bias that is moved by the step of its weights, moments that leave
the range of the parameters' dtype.
"""

from __future__ import annotations

import pytest
import torch
from precondition_networks import one_layer, relative, uneven
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError


def relu_rows(count: int, features: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, dtype=torch.float64, generator=g).clamp_min(0)


def test_without_a_bias_the_closed_forms() -> None:
    x = uneven((30, 4), 2)
    mu, variance = x.mean(dim=0), x.var(dim=0, correction=0)
    risk = one_layer(x, 2, bias=False)
    P = bnp.bnp_preconditioner(risk, block=("", 0)).to_dense()
    assert relative(P @ P.T, torch.linalg.inv(variance.diag() + torch.outer(mu, mu))) < 1e-12
    diagonal = bnp.bnp_preconditioner(risk, bias_free="diagonal")
    rms = x.square().mean(dim=0).sqrt()
    q = (1 + float((mu.square() / rms.square()).sum())) ** 0.5
    torch.testing.assert_close(diagonal.block(("", 0)).to_dense(), torch.diag(1 / rms) / q, rtol=1e-13, atol=0)
    assert diagonal.q[""] == pytest.approx(q, rel=1e-14)


def test_the_diagonal_form_equilibrates_a_constant_feature_too() -> None:
    x = uneven((30, 3), 2)
    x[:, 1] = 1e-3
    P = bnp.bnp_preconditioner(one_layer(x, bias=False), bias_free="diagonal", q=1.0)
    torch.testing.assert_close((x @ P.to_dense()).square().mean(dim=0), torch.ones(3, dtype=torch.float64))


def test_the_mean_direction_survives_the_diagonal_form() -> None:
    """ReLU inputs, `m = 512`, `R = 256`: `q^2` is 165 where a centred layer has 2."""
    risk = one_layer(relu_rows(256, 512), bias=False)
    squares = [bnp.bnp_preconditioner(risk, bias_free=form).q[""] ** 2 for form in ("rank-one", "diagonal")]
    assert squares[0] == pytest.approx(2)
    assert squares[1] == pytest.approx(165, rel=0.02)


def test_one_correction_of_rank_one_beats_the_diagonal_on_relu_inputs() -> None:
    """The singular values of `H P`, `m = 512`, features of scales 0.1 to 10.

    Raw, diagonal, rank-one: 178, 35.4, 5.46 on 256 rows; 649, 31.0, 3.00 on 2048.
    """
    scales = 10 ** torch.linspace(-1, 1, 512, dtype=torch.float64)
    for count, expected in ((256, (178, 35.4, 5.46)), (2048, (649, 31.0, 3.00))):
        x = relu_rows(count, 512) * scales
        risk = one_layer(x, bias=False)

        def kappa(matrix: Tensor) -> float:
            s = torch.linalg.svdvals(matrix)
            return float(s[0] / s[-1])

        conditioned = [
            kappa(bnp.bnp_preconditioner(risk, bias_free=form).apply_transpose(x.T.contiguous()))
            for form in ("diagonal", "rank-one")
        ]
        assert [kappa(x), *conditioned] == pytest.approx(expected, rel=0.02)


def test_a_frozen_bias_gives_the_form_without_one() -> None:
    x = uneven((30, 4), 2)
    model = nn.Linear(4, 2).double()
    model.bias.requires_grad_(False)
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, torch.zeros(30, 2, dtype=torch.float64)))
    free = bnp.EmpiricalRisk(
        nn.Linear(4, 2, bias=False).double(), nn.functional.mse_loss, (x, torch.zeros(30, 2, dtype=torch.float64))
    )
    P = bnp.bnp_preconditioner(risk)
    assert P.uncovered == {}
    assert torch.equal(P.to_dense(), bnp.bnp_preconditioner(free).to_dense())
    frozen_weight = nn.Linear(4, 2).double()
    frozen_weight.weight.requires_grad_(False)
    with pytest.raises(InvalidInputError, match="weight is frozen"):
        bnp.bnp_preconditioner(bnp.EmpiricalRisk(frozen_weight, nn.functional.cross_entropy, (x, torch.arange(30) % 2)))
