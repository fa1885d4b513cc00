"""Why BNP conditions: centering, scaling, the curvature of the loss between them, the size of the gain (T7).

The inequalities are checked on the matrices that the package's own preconditioners make. Bugs that only these tests
catch: a normalization that is invertible and even invariant but conditions nothing (a wrong power of `sigma`, a mean
over the wrong axis), and a hypothesis of a theorem that is taken for granted: centering without full column rank,
monotone improvement through an uneven `S`.
"""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st
from precondition_networks import one_layer
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.precondition import BNPBlock

SLACK = 1 + 1e-7
SEEDS = st.integers(0, 2**20)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def extended(H: Tensor) -> Tensor:
    return torch.cat([H, H.new_ones(H.shape[0], 1)], dim=1)


def centered(H: Tensor) -> Tensor:
    """`H^ U`: the package's block with unit variances."""
    U = BNPBlock(H.mean(dim=0)[None], torch.ones(1, H.shape[1], dtype=H.dtype), 1.0, units=1, bias=True)
    return U.normalized(H[:, None])[:, 0]


def normalized(H: Tensor) -> Tensor:
    """`G^`: the package's preconditioner of a layer with one unit, without `q`."""
    P = bnp.bnp_preconditioner(one_layer(H), q=1.0)
    return P.apply_transpose(extended(H).T.contiguous()).T


def kappa(matrix: Tensor, rank: int | None = None) -> float:
    """The effective condition number, with the rank known from the construction."""
    s = torch.linalg.svdvals(matrix)
    r = min(matrix.shape) if rank is None else rank
    if r < s.numel():
        assert s[r] < 1e-8 * s[r - 1], "the rank of the construction"
    return float(s[0] / s[r - 1])


def inputs(seed: int, rows: int, features: int, spread: float, shift: float) -> Tensor:
    """Correlated rows with uneven scales and a mean."""
    mixing = torch.eye(features, dtype=torch.float64) + 0.5 * normal(seed + 1, features, features)
    scales = 10 ** (spread * (2 * torch.rand(features, generator=torch.Generator().manual_seed(seed)).double() - 1))
    return (normal(seed, rows, features) @ mixing + shift * normal(seed + 2, features)) * scales


# (a) centering


@given(seed=SEEDS, features=st.integers(1, 6), extra=st.integers(2, 20), spread=st.floats(0, 2), shift=st.floats(0, 50))
def test_centering_helps_at_full_column_rank(seed: int, features: int, extra: int, spread: float, shift: float) -> None:
    H = inputs(seed, features + extra, features, spread, shift)
    assert kappa(centered(H)) <= kappa(extended(H)) * SLACK


def test_centering_of_the_whole_matrix_of_a_layer() -> None:
    """The same through the operators: `S` is a multiple of I here, so the matrix sees the square."""
    H = inputs(3, 30, 4, 1.0, 10.0)
    risk = one_layer(H, 2)
    U = BNPBlock(H.mean(dim=0)[None], torch.ones(1, 4, dtype=torch.float64), 1.0, units=2, bias=True)
    A = bnp.gauss_newton(risk)
    plain, better = bnp.condition_number(A), bnp.condition_number(A, preconditioner=U)
    assert plain.value == pytest.approx(kappa(extended(H)) ** 2, rel=1e-8)
    assert better.value == pytest.approx(kappa(centered(H)) ** 2, rel=1e-8)
    assert better.upper < plain.lower


def test_without_full_column_rank_centering_may_hurt() -> None:
    """Two rows, `kappa*` 3.162 becomes 10."""
    H = torch.tensor([[10.0, 3.0], [-10.0, 3.0]], dtype=torch.float64)
    assert torch.linalg.matrix_rank(extended(H)) == H.shape[1], "not H.shape[1] + 1: the hypothesis fails"
    assert kappa(extended(H), 2) == pytest.approx(10**0.5, rel=1e-12)
    assert kappa(centered(H), 2) == pytest.approx(10.0, rel=1e-12)
    # The second feature is constant: set aside, the columns are independent again and nothing is lost.
    assert bnp.bnp_preconditioner(one_layer(H)).constant_features == {"": (1,)}
    rest = H[:, :1]
    assert kappa(centered(rest)) <= kappa(extended(rest)) * SLACK


# (b) scaling


def best_over_scales(H: Tensor, rank: int, seed: int) -> float:
    """`min_D kappa*(H_c D)` by search: random scales, then the simplex method from the best one."""
    H_c = H - H.mean(dim=0)

    def objective(logs: object) -> float:
        D = torch.as_tensor(logs, dtype=torch.float64).exp()
        return math.log(kappa(H_c * D, rank))

    starts = [torch.zeros(H.shape[1], dtype=torch.float64), -H_c.norm(dim=0).log()]
    starts += [starts[1] + normal(seed + i, H.shape[1]) for i in range(20)]
    start = min(starts, key=objective)
    options = {"maxfev": 400, "xatol": 1e-3, "fatol": 1e-6}
    found = scipy.optimize.minimize(objective, start.numpy(), method="Nelder-Mead", options=options)
    return math.exp(min(float(found.fun), objective(start)))


def low_rank(seed: int, rows: int, features: int, rank: int) -> Tensor:
    return (normal(seed, rows, rank) @ normal(seed + 1, rank, features) + normal(seed + 2, features)) * 10 ** normal(
        seed + 3, features
    )


@pytest.mark.parametrize("shape", [(12, 4, 4), (4, 4, 3), (3, 5, 2), (12, 5, 2)])
def test_unit_columns_are_within_sqrt_m_of_the_best_scaling_at_any_rank(shape: tuple[int, int, int]) -> None:
    """`kappa*(G) <= sqrt(m) min_D kappa*(H_c D)`, sharper than van der Sluis and without a rank hypothesis."""
    rows, features, rank = shape
    for seed in range(4):
        H = low_rank(100 * seed, rows, features, min(rank, rows - 1))
        G = normalized(H)[:, :-1]
        torch.testing.assert_close(G.norm(dim=0), torch.full((features,), rows**0.5, dtype=torch.float64))
        assert kappa(G, rank) <= features**0.5 * best_over_scales(H, rank, seed) * SLACK


@given(seed=SEEDS, features=st.integers(2, 6), rows=st.integers(3, 15), spread=st.floats(0, 2))
def test_unit_columns_against_many_scalings(seed: int, features: int, rows: int, spread: float) -> None:
    H = inputs(seed, rows, features, spread, 5.0)
    rank = min(features, rows - 1)
    H_c = H - H.mean(dim=0)
    bound = min(kappa(H_c * (spread * normal(seed + i, features)).exp(), rank) for i in range(20))
    assert kappa(normalized(H)[:, :-1], rank) <= features**0.5 * bound * SLACK


@given(seed=SEEDS, features=st.integers(1, 6), extra=st.integers(2, 20), spread=st.floats(0, 2))
def test_the_column_of_the_bias_costs_nothing_at_full_rank(seed: int, features: int, extra: int, spread: float) -> None:
    """`sigma_max(G)^2 >= R >= sigma_min(G)^2`, so `kappa(G^) = kappa(G)`."""
    H = inputs(seed, features + extra, features, spread, 5.0)
    G = normalized(H)
    s = torch.linalg.svdvals(G[:, :-1])
    assert s[-1] ** 2 <= H.shape[0] * SLACK
    assert s[0] ** 2 >= H.shape[0] / SLACK
    assert kappa(G) == pytest.approx(kappa(G[:, :-1]), rel=1e-9)


def test_the_column_of_the_bias_may_cost_at_deficient_rank() -> None:
    """Two equal features: `kappa*(G) = 1` and `kappa*(G^) = sqrt 2`; the equality needs full column rank."""
    H = normal(0, 8, 1).expand(8, 2)
    G = normalized(H)
    assert kappa(G[:, :-1], 1) == pytest.approx(1.0)
    assert kappa(G, 2) == pytest.approx(2**0.5)


# (c) through the curvature of the loss


def weighted(H: Tensor, S: Tensor) -> bnp.EmpiricalRisk:
    """One unit with Gauss-Newton matrix `H^^T S H^`, `S` diagonal: weighted least squares."""

    def loss(output: Tensor, s: Tensor) -> Tensor:
        return 0.5 * (s * output.square()).mean()

    return bnp.EmpiricalRisk(nn.Linear(H.shape[1], 1).double(), loss, (H, H.shape[0] * S[:, None]))


def through(H: Tensor, S: Tensor) -> tuple[float, float]:
    """`kappa(H^^T S H^)` and `kappa(G^^T S G^)` from factors; the operators agree in a test of their own."""
    root = S.sqrt()[:, None]
    return kappa(root * extended(H)) ** 2, kappa(root * normalized(H)) ** 2


def test_the_operators_see_the_same_numbers() -> None:
    H, S = inputs(5, 20, 3, 1.0, 5.0), 10 ** normal(6, 20)
    risk = weighted(H, S)
    A, P = bnp.gauss_newton(risk), bnp.bnp_preconditioner(risk)
    found = bnp.condition_number(A).value, bnp.condition_number(A, preconditioner=P).value
    assert found == pytest.approx(through(H, S), rel=1e-7)


@given(
    seed=SEEDS,
    features=st.integers(1, 5),
    extra=st.integers(2, 15),
    spread=st.floats(0, 2),
    shift=st.floats(0, 20),
    uneven=st.floats(0, 2),
)
def test_the_bounds_through_an_uneven_curvature(
    seed: int, features: int, extra: int, spread: float, shift: float, uneven: float
) -> None:
    """`kappa(G^^T S G^) <= kappa(G^)^2 kappa(S)`, and `<= m kappa(S)^2 kappa(H^^T S H^)` in any case."""
    H = inputs(seed, features + extra, features, spread, shift)
    S = 10 ** (uneven * normal(seed + 9, H.shape[0]))
    of_S = float(S.max() / S.min())
    raw, conditioned = through(H, S)
    assert conditioned <= kappa(normalized(H)) ** 2 * of_S * SLACK
    assert conditioned <= features * of_S**2 * raw * SLACK


def test_an_uneven_curvature_may_make_it_worse() -> None:
    """No monotone improvement: rows that hardly count move the mean, and BNP centres where the loss is flat.

    1.94 becomes 7248.
    """
    H = torch.cat([normal(0, 20, 2), 50 + normal(1, 20, 2)])
    S = torch.cat([torch.ones(20, dtype=torch.float64), torch.full((20,), 1e-6, dtype=torch.float64)])
    raw, conditioned = through(H, S)
    assert conditioned > 1e3 * raw
    assert conditioned <= 2 * 1e12 * raw
    raw, conditioned = through(H, torch.ones(40, dtype=torch.float64))
    assert conditioned < raw / 2, "with an even curvature it helps"


@pytest.mark.parametrize("seed", range(2))
def test_the_bound_for_softmax_whose_curvature_is_singular(seed: int) -> None:
    """The null space of `S` is one shift of the logits for every example, so the bound holds for `kappa*`."""
    H = inputs(seed, 25, 3, 1.0, 2.0)
    model = nn.Linear(3, 4).double()
    with torch.no_grad():
        model.weight.copy_(0.3 * normal(seed, 4, 3) / H.std(dim=0))
        model.bias.copy_(normal(seed + 1, 4))
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (H, torch.arange(25) % 4))
    p = torch.softmax(risk.outputs, dim=1)
    S = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    values = torch.linalg.eigvalsh(S)[:, 1:]
    k = bnp.condition_number(bnp.gauss_newton(risk), preconditioner=bnp.bnp_preconditioner(risk))
    assert k.rank == 3 * 4
    assert k.value <= kappa(normalized(H)) ** 2 * float(values.max() / values.min()) * SLACK


# (d) the size of the gain


@given(mean=st.floats(0, 1e3), deviation=st.floats(1e-2, 1e2), seed=SEEDS)
def test_the_gain_for_an_isotropic_covariance(mean: float, deviation: float, seed: int) -> None:
    """`kappa(H^)/kappa(H^U) ~ t / max(1, sigma^2)`, `t = 1 + |mu|^2 + sigma^2`, within `2 sigma^2/t^2`."""
    rows, features = 12, 3
    Q = torch.linalg.qr(torch.cat([torch.ones(rows, 1, dtype=torch.float64), normal(seed, rows, features)], dim=1))[0]
    direction = nn.functional.normalize(normal(seed + 1, features), dim=0)
    H = mean * direction + deviation * rows**0.5 * Q[:, 1:]
    t = 1 + mean**2 + deviation**2
    gain = kappa(extended(H)) / kappa(centered(H))
    predicted = t / max(1.0, deviation**2)
    assert abs(gain / predicted - 1) <= 2 * deviation**2 / t**2 + 1e-5


def test_the_matrix_of_a_layer_sees_up_to_the_square_of_the_gain() -> None:
    Q = torch.linalg.qr(torch.cat([torch.ones(40, 1, dtype=torch.float64), normal(0, 40, 3)], dim=1))[0]
    H = 10.0 + 0.5 * 40**0.5 * Q[:, 1:]
    risk = one_layer(H)
    A = bnp.gauss_newton(risk)
    plain = bnp.condition_number(A).value
    conditioned = bnp.condition_number(A, preconditioner=bnp.bnp_preconditioner(risk)).value
    t = 1 + 300 + 0.25
    assert conditioned == pytest.approx(1.0, rel=1e-6)
    assert plain == pytest.approx((t / 0.5) ** 2, rel=1e-4), "(t/max(1, sigma^2))^2 times 1/sigma^2 of the scaling"
