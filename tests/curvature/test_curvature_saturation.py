"""Condition numbers of saturated networks against mpmath: what is claimed contains the truth.

Only these tests catch a derivative that rounding made zero and that is then counted as structure, a loss whose
curvature cancels and passes for accurate, a saturated unit that is called dead, and a closed form that is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.curvature import output_curvature
from bnp_analysis.network.saturation import has_vanished

mp.mp.dps = 60


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def bell(x: Any) -> Any:
    return sigmoid(x) * sigmoid(-x)


def by_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return -(y * torch.log(torch.sigmoid(z)) + (1 - y) * torch.log(torch.sigmoid(-z))).mean()


def by_log1p(z: Tensor, y: Tensor) -> Tensor:
    return (z.clamp(min=0) - z * y + torch.log1p(torch.exp(-z.abs()))).mean()


# Loss of logits -> a multiple of its curvature there.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Any], Any]]] = {
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, bell),
    "soft margin": (lambda z, y: F.soft_margin_loss(z, 2 * y - 1), bell),
    "by probabilities": (by_probabilities, bell),
    "by log1p": (by_log1p, bell),
    "log cosh": (lambda z, y: torch.log(torch.cosh(z)).mean() + 0 * y.sum(), lambda z: bell(2 * z)),
    "Poisson": (F.poisson_nll_loss, mp.exp),
    "softplus": (lambda z, y: F.softplus(z).mean() + 0 * y.sum(), bell),
}
UNITS: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
    "tanh": (nn.Tanh(), mp.tanh),
    "sigmoid": (nn.Sigmoid(), sigmoid),
    "gelu": (nn.GELU(), lambda x: x * mp.ncdf(x)),
    "silu": (nn.SiLU(), lambda x: x * sigmoid(x)),
    "softplus": (nn.Softplus(), lambda x: mp.log1p(mp.exp(x))),
    "logsigmoid": (nn.LogSigmoid(), lambda x: -mp.log1p(mp.exp(-x))),
    "mish": (nn.Mish(), lambda x: x * mp.tanh(mp.log1p(mp.exp(x)))),
    "elu": (nn.ELU(), lambda x: x if x > 0 else mp.expm1(x)),
    "softsign": (nn.Softsign(), lambda x: x / (1 + abs(x))),
}
# Precision -> logits from where a derivative is ordinary to where it is lost.
PRECISIONS = {torch.float64: (5.0, 28.0, 37.0), torch.float32: (5.0, 14.0, 60.0)}
# Written as differences of large terms: beyond some logit nothing is left of their curvature but rounding.
CANCELLING = {"log cosh"}


def saturated(sizes: Sequence[float], step: float) -> list[list[float]]:
    """Pairs of arguments: an ordinary one beside a saturated one of either sign, and two that are saturated alike."""
    small, middle, large = sizes
    beside = [[0.5, size] for size in (small, middle, -middle, -large)]
    return [*beside, [-middle, -middle - step]]


def contains(found: bnp.linalg.ConditionNumber, truth: Any) -> bool:
    return bool(found.lower <= truth <= found.upper)


def check(A: Any, truth: Any, *, largest: Any = 1.0, cancels: bool = False) -> None:
    """A number comes out that does not exclude the truth; refused is only what has no digits, in words that say why.

    Args:
        A: the operator.
        truth: its condition number.
        largest: of the derivatives it is made of; below the numbers of its dtype it is zero.
        cancels: whether the loss is written so that its derivatives cancel.
    """
    if cancels and A.eps > 1e-4:
        with pytest.raises(bnp.errors.InvalidInputError, match="difference of nearly equal numbers"):
            bnp.condition_number(A)
        return
    try:
        found = bnp.condition_number(A)
    except bnp.errors.ZeroOperatorError:
        # Of terms near 1 that cancel nothing is left below their rounding.
        assert largest < (torch.finfo(A.dtype).eps if cancels else torch.finfo(A.dtype).tiny)
        return
    assert contains(found, truth), found
    assert found.two_sided or "one-sided: " in str(found)


def logits(values: Sequence[float], loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> bnp.EmpiricalRisk:
    model = nn.Linear(len(values), 1, bias=False, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values], dtype=dtype))
    return bnp.EmpiricalRisk(
        model, loss, (torch.eye(len(values), dtype=dtype), torch.zeros(len(values), 1, dtype=dtype))
    )


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, dtype: torch.dtype) -> None:
    loss, curvature = LOSSES[name]
    for values in saturated(PRECISIONS[dtype], 0.5):
        try:
            risk = logits(values, loss, dtype)
        except bnp.errors.NonFiniteError:
            assert name in {"by probabilities", *CANCELLING}  # 0 log 0
            continue
        S = [curvature(mp.mpf(z)) for z in values]
        for A in (bnp.gauss_newton(risk), bnp.hessian(risk)):
            check(A, max(S) / min(S), largest=max(S), cancels=name in CANCELLING)


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, by_probabilities])
@pytest.mark.parametrize("size", [14.0, 36.0, -37.0])
def test_the_closed_form_is_two_sided(size: float, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = bnp.condition_number(bnp.gauss_newton(logits([0.5, size], loss, torch.float64)))
    assert found.two_sided
    assert contains(found, bell(mp.mpf(0.5)) / bell(mp.mpf(size)))
    assert found.upper < (1 + 1e-4) * found.lower


class Through(nn.Module):
    """A function of probabilities as the outputs of a model."""

    def __init__(self, function: Callable[[Tensor], Tensor], values: Sequence[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(2, 1, bias=False, dtype=dtype), function
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([values], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(torch.sigmoid(self.linear(x)))


# Functions of p = sigmoid(z), which rounds 1 - p, and their derivatives by z.
OF_PROBABILITIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "logit": (torch.logit, lambda z: mp.mpf(1)),
    "log of the other": (lambda p: torch.log(1 - p), lambda z: -sigmoid(z)),
    "log odds": (lambda p: p.log() - (1.0 - p).log(), lambda z: mp.mpf(1)),
    "the other": (lambda p: 1 - p, lambda z: -bell(z)),
    "moved": (lambda p: (1 - p.squeeze(-1)).log().unsqueeze(-1), lambda z: -sigmoid(z)),
    "written into": (lambda p: 1 - p.clone().mul_(0.5), lambda z: -bell(z) / 2),
}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_probabilities_near_one(name: str, dtype: torch.dtype) -> None:
    """`logit(sigmoid(z))` had a slope of 1.0002 at 8 in float32, two-sided, and of 1.12 at 16."""
    function, slope = OF_PROBABILITIES[name]
    for z in (8.0, 12.0, 16.0) if dtype == torch.float32 else (12.0, 20.0, 35.0):
        model = Through(function, [0.5, z], dtype)
        data = torch.eye(2, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
        found = bnp.condition_number(bnp.gauss_newton(bnp.EmpiricalRisk(model, F.mse_loss, data)))
        squares = [slope(mp.mpf(z)) ** 2 for z in (0.5, z)]
        truth = max(squares) / min(squares)
        assert found.two_sided or truth * torch.finfo(dtype).eps ** 2 > 1e-6
        assert contains(found, truth), (z, found)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_binary_cross_entropy_of_probabilities(dtype: torch.dtype) -> None:
    """The outputs have rounded `1 - p`: 28.6 was claimed for 40,689 at 12 in float32."""
    for z in (8.0, 12.0, 20.0):
        model = Through(lambda p: p, [0.0, z], dtype)
        data = torch.eye(2, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
        risk = bnp.EmpiricalRisk(model, F.binary_cross_entropy, data)
        p = sigmoid(mp.mpf(z))
        for A, truth in ((bnp.hessian(risk), bell(0) / bell(mp.mpf(z))), (bnp.gauss_newton(risk), 4 * p * p)):
            if A.eps > 1e-4:
                with pytest.raises(bnp.errors.InvalidInputError, match="binary_cross_entropy_with_logits"):
                    bnp.condition_number(A)
            else:
                found = bnp.linalg.magnitude_condition_number(A)
                assert contains(found, truth), (z, found)


def unit(activation: nn.Module, values: Sequence[float], dtype: torch.dtype) -> bnp.EmpiricalRisk:
    net = nn.Sequential(nn.Linear(2, 1, dtype=dtype), activation, nn.Linear(1, 1, dtype=dtype))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([values], dtype=dtype))
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
    return bnp.EmpiricalRisk(net, F.mse_loss, (torch.eye(2, dtype=dtype), torch.zeros(2, 1, dtype=dtype)))


def slope(name: str, z: float) -> Any:
    """The derivative of an activation; a difference quotient of GELU would take `ncdf` of hundreds of digits."""
    if name == "gelu":
        with mp.workdps(100):
            return mp.ncdf(z) + z * mp.npdf(z)
    with mp.workdps(800):
        return mp.diff(UNITS[name][1], mp.mpf(z), h=mp.mpf(10) ** -200)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", UNITS)
def test_units(name: str, dtype: torch.dtype) -> None:
    activation, _ = UNITS[name]
    for values in saturated((4.0, 8.0, 400.0) if dtype == torch.float32 else (8.0, 20.0, 60.0), 0.25):
        a, b = (slope(name, z) for z in values)
        with mp.workdps(100):
            # Rows (a, 0, a) and (0, b, b): the Gram matrix is [[2 a^2, a b], [a b, 2 b^2]].
            trace, determinant = 2 * (a * a + b * b), 3 * a * a * b * b
            top = (trace + mp.sqrt(trace * trace - 4 * determinant)) / 2
            truth = top * top / determinant
        risk = unit(activation, values, dtype)
        check(bnp.gauss_newton(risk, block="0"), truth, largest=max(abs(a), abs(b)))
        if min(abs(a), abs(b)) > 1e-6:
            continue
        null = bnp.null_directions(risk, block="0")
        assert "dead units" not in null.sources, values
        assert "inactive rows" not in null.sources, values


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu"])
def test_units_that_are_all_saturated_are_two_sided(name: str) -> None:
    """Nothing is small beside them, so that all their digits count."""
    activation, exact = UNITS[name]
    size = -12.0 if name == "gelu" else 17.0
    with mp.workdps(300):
        a, b = (mp.diff(exact, mp.mpf(z), h=mp.mpf(10) ** -80) for z in (size, size + 0.25))
        trace, determinant = 2 * (a * a + b * b), 3 * a * a * b * b
        top = (trace + mp.sqrt(trace * trace - 4 * determinant)) / 2
    found = bnp.condition_number(bnp.gauss_newton(unit(activation, [size, size + 0.25], torch.float64), block="0"))
    assert found.two_sided
    assert contains(found, top * top / determinant)


def test_masks_are_structure_still() -> None:
    x = torch.tensor([[1.0, 2.0], [2.0, -1.0], [0.5, 1.0]], dtype=torch.float64)
    net = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64), nn.ReLU(), nn.Linear(2, 1, dtype=torch.float64))
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([-100.0, 3.0]))
        net[2].weight.fill_(1.0)
    risk = bnp.EmpiricalRisk(net, F.mse_loss, (x, torch.zeros(3, 1, dtype=torch.float64)))
    null = bnp.null_directions(risk, block="0")
    assert null.sources["dead units"] == 3
    found = bnp.condition_number(bnp.gauss_newton(risk, block="0"), null=null)
    assert found.two_sided


def test_tables_fisher_and_magnitudes() -> None:
    """Three saturated units and one that is not; the truth of unit 0 from its slopes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(2, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 1, dtype=torch.float64))
    with torch.no_grad():
        net[0].weight.mul_(0.1)
        net[0].bias.copy_(torch.tensor([17.0, -30.0, 200.0, 0.1]))
    risk = bnp.EmpiricalRisk(net, F.binary_cross_entropy_with_logits, (x, torch.zeros(6, 1, dtype=torch.float64)))
    W, b, V, c = risk.space.unflatten(risk.theta).values()
    with mp.workdps(80):
        rows = []
        for h in x.tolist():
            a = [mp.mpf(b[i].item()) + mp.fsum(mp.mpf(W[i, k].item()) * h[k] for k in range(2)) for i in range(4)]
            z = mp.mpf(c.item()) + mp.fsum(mp.mpf(V[0, i].item()) * mp.tanh(a[i]) for i in range(4))
            s = mp.sqrt(bell(z)) / mp.cosh(a[0]) ** 2
            rows.append([s * h[0], s * h[1], s])
        sigma = mp.svd_r(mp.matrix(rows), compute_uv=False)
        truth = (sigma[0] / sigma[2]) ** 2
    found = bnp.condition_number(bnp.gauss_newton(risk, block=("0", 0)))
    assert contains(found, truth)
    assert found.two_sided
    for A in (bnp.hessian(risk), bnp.gauss_newton(risk), bnp.fisher(risk), bnp.fisher(risk, "empirical")):
        result = bnp.linalg.magnitude_condition_number(A)
        assert result.lower >= 1 - 1e-6
        assert not result.two_sided  # unit 2 has slopes of 1e-170
    assert bnp.layer_table(risk) is not None


class Step(nn.Module):
    """One step of a recurrent layer from a state of zeros."""

    def __init__(self, kind: Callable[..., nn.Module], gates: int, weight: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = kind(2, 1, bias=False).to(dtype)
        w = torch.full((gates, 2), 0.5)
        w[:, 1] = weight
        if gates == 3:
            w[1, 1] = -weight
        with torch.no_grad():
            next(self.layer.parameters()).copy_(w)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x) if isinstance(self.layer, nn.RNNCellBase) else self.layer(x.unsqueeze(0))[0][0]
        return found[0] if isinstance(found, tuple) else found


def lstm(i: Any, f: Any, g: Any, o: Any) -> Any:
    return sigmoid(o) * mp.tanh(sigmoid(i) * mp.tanh(g))


def gru(r: Any, z: Any, n: Any) -> Any:
    return sigmoid(-z) * mp.tanh(n)


@pytest.mark.parametrize(("weight", "dtype"), [(10.0, torch.float32), (20.0, torch.float64), (45.0, torch.float64)])
@pytest.mark.parametrize(
    ("kind", "unit", "gates"),
    [(nn.RNN, mp.tanh, 1), (nn.LSTMCell, lstm, 4), (nn.LSTM, lstm, 4), (nn.GRU, gru, 3)],
)
def test_saturated_gates_of_a_recurrent_layer_are_no_structure(
    kind: Any, unit: Callable[..., Any], gates: int, weight: float, dtype: torch.dtype
) -> None:
    model = Step(kind, gates, weight, dtype)
    (name, w), *_ = model.named_parameters()
    risk = bnp.EmpiricalRisk(
        model, F.mse_loss, (torch.eye(2, dtype=dtype), torch.zeros(2, 1, dtype=dtype)), params=[name]
    )
    found = bnp.condition_number(bnp.gauss_newton(risk))
    # Each example sees one column of the weights alone, so the factor's rows are orthogonal.
    sizes = []
    for column in w.detach().double().T.tolist():
        slopes = [mp.diff(unit, tuple(column), tuple(int(j == k) for j in range(gates))) for k in range(gates)]
        sizes.append(mp.fsum(s * s for s in slopes))
    truth = float(max(sizes) / min(sizes))
    assert found.lower <= truth <= found.upper


@pytest.mark.parametrize("logit", [5.0, 12.0, -14.0, -37.0])
def test_the_product_with_binary_cross_entropy_of_probabilities(logit: float) -> None:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, logit]]))
    data = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, lambda z, y: F.binary_cross_entropy(torch.sigmoid(z), y), data)
    found = bnp.condition_number(bnp.gauss_newton(risk))
    assert found.lower <= float(bell(mp.mpf(0)) / bell(mp.mpf(logit))) <= found.upper < 1.001 * found.lower


def test_a_poisson_rate_that_underflows_is_no_structure() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -300.0]]))
    risk = bnp.EmpiricalRisk(model, nn.PoissonNLLLoss(), (torch.eye(2), torch.zeros(2, 1)))
    assert bnp.condition_number(bnp.gauss_newton(risk)).upper == float("inf")


def test_a_certain_probability_is_no_error_where_rounding_is_tried() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid()).double()
    nn.init.ones_(model[0].weight)
    x = torch.tensor([[40.0], [1.0], [-2.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, nn.BCELoss(), (x, y))
    by_logits = bnp.EmpiricalRisk(model[0], nn.BCEWithLogitsLoss(), (x, y))
    torch.testing.assert_close(bnp.hessian(risk).to_dense(), bnp.hessian(by_logits).to_dense(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("logit", [10.0, 30.0])
def test_rounding_is_not_moved_beyond_probabilities(logit: float, dtype: torch.dtype) -> None:
    """A probability of 1 that is moved up is none, and `binary_cross_entropy` raises: of many some are moved so."""
    model = nn.Linear(2, 16, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, logit, 32).view(16, 2))
    data = torch.eye(2, dtype=dtype), (torch.arange(32).view(2, 16) % 3 == 0).to(dtype)
    risk = bnp.EmpiricalRisk(model, lambda z, y: F.binary_cross_entropy(torch.sigmoid(z), y), data)
    found = bnp.condition_number(bnp.gauss_newton(risk))
    bends = [bell(mp.mpf(float(w))) for w in model.weight.detach().flatten()]
    assert found.lower <= float(max(bends) / min(bends)) <= found.upper


class By(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Functions written by hand, whose slopes cancel as they saturate, and the slopes.
BY_HAND: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any], float]] = {
    "x / sqrt(1 + x^2)": (lambda x: x / torch.sqrt(1 + x * x), lambda z: (1 + z * z) ** mp.mpf(-1.5), 1e4),
    "sigmoid": (lambda x: x.exp() / (1 + x.exp()), bell, 20.0),
    "squareplus": (lambda x: (x + torch.sqrt(x * x + 1)) / 2, lambda z: (1 + z / mp.sqrt(1 + z * z)) / 2, -1e4),
    "asinh": (lambda x: torch.log(x + torch.sqrt(x * x + 1)), lambda z: 1 / mp.sqrt(1 + z * z), -1e3),
}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", BY_HAND)
def test_slopes_by_hand_have_the_digits_that_their_operations_leave(name: str, dtype: torch.dtype) -> None:
    """In float32 `kappa* = 1 (1 .. 1)` was claimed where the truth is 5e23, and 7.4e5 for 8.0e5."""
    function, slope, size = BY_HAND[name]
    risk = unit(By(function), [0.5, size], dtype)
    squares = [slope(mp.mpf(z)) ** 2 for z in (0.5, size)]
    found = bnp.condition_number(bnp.gauss_newton(risk, block="0"))
    # The bias adds a direction: of two rows, rank 2 of 3.
    rows = mp.matrix([[s, 0, s] if k == 0 else [0, s, s] for k, s in enumerate(map(mp.sqrt, squares))])
    singular = mp.svd_r(rows, compute_uv=False)
    assert contains(found, (max(singular) / min(singular)) ** 2), found


@pytest.mark.parametrize("z", [12.3, 14.0, 15.1, 16.2])
def test_moves_of_two_operations_do_not_cancel(z: float) -> None:
    """`-p` moved against `p = sigmoid(z)` in every trial: an interval of 1e-5 around a number that was off by 1e-4."""
    loss = logits([0.25, z], lambda o, y: -torch.log1p(-torch.sigmoid(o)).mean(), torch.float64)
    assert contains(bnp.condition_number(bnp.gauss_newton(loss)), bell(mp.mpf(0.25)) / bell(mp.mpf(z)))


def test_the_partial_likelihood_of_survival_times_keeps_its_digits() -> None:
    """Cox's loss couples examples by cumulative sums; torch's derivatives of them add the largest number to itself."""
    g = torch.Generator().manual_seed(0)
    x, died = torch.randn(25, 4, generator=g).double(), torch.rand(25, generator=g).double().round()
    model = bnp.models.mlp([4, 5, 1], activation="tanh", dtype=torch.float64)
    later = torch.full((25, 25), -torch.inf, dtype=torch.float64).triu(1)

    def cox(z: Tensor, y: Tensor) -> Tensor:
        return -((z[:, 0] - torch.logcumsumexp(z[:, 0], 0)) * y).mean()

    def by_rows(z: Tensor, y: Tensor) -> Tensor:
        return -((z[:, 0] - (z[:, 0] + later).logsumexp(1)) * y).mean()

    found, other = (bnp.gauss_newton(bnp.EmpiricalRisk(model, loss, (x, died))) for loss in (cox, by_rows))
    assert found.eps < 1e-14
    torch.testing.assert_close(found.to_dense(), other.to_dense(), rtol=1e-12, atol=1e-15)
    interval = bnp.condition(bnp.EmpiricalRisk(model, cox, (x, died)), preconditioner=None).without_P
    truth = torch.linalg.eigvalsh(other.to_dense()).flip(0)
    for rank, low, high in zip(interval.ranks.tolist(), interval.lower, interval.upper, strict=True):
        assert low * (1 - 1e-9) <= float(truth[0] / truth[rank - 1]) <= high * (1 + 1e-9)


def test_a_loss_is_tried_once_for_all_blocks_and_anew_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outputs have the same digits; those of another point, dtype or part of the data have others."""
    tried = []
    known = output_curvature._loss_doubt
    monkeypatch.setattr(output_curvature, "_loss_doubt", lambda risk: tried.append(risk) or known(risk))
    risk = logits([0.5, 3.0], LOSSES["log cosh"][0], torch.float64)
    for made in (risk, risk.restrict(["weight"]), risk.restrict(["weight"])):
        assert output_curvature.products_of_loss(made) == output_curvature.products_of_loss(risk)
    assert len(tried) == 1
    far = risk.at(torch.tensor([0.5, 15.0], dtype=torch.float64))
    assert output_curvature.products_of_loss(far)[0] > 10 * output_curvature.products_of_loss(risk)[0]
    for other in (risk.to(torch.float32), risk.alone(next(iter(risk.batches)))):
        output_curvature.products_of_loss(other)
    assert len(tried) == 4


@pytest.mark.parametrize(("size", "vanished"), [(3.0, False), (800.0, True)], ids=["not looked at", "saturated"])
def test_zeros_of_a_loss_are_structure_where_it_does_not_look(size: float, vanished: bool) -> None:
    """One output has no part in the loss; beside it one whose curvature may have underflowed."""

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(o[:, 0], y[:, 0])

    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[size], [1.0]]))
    risk = bnp.EmpiricalRisk(model, loss, (torch.ones(1, 1).double(), torch.zeros(1, 2).double()))
    assert output_curvature.products_of_loss(risk)[1] is vanished
    assert bnp.gauss_newton(risk).zeros_are_structural is not vanished


class Branching(nn.Module):
    """`how` makes the output of the values of a layer, and of the data."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(2, 2), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.layer(x), x)


def by_slope(h: Tensor, x: Tensor) -> Tensor:
    """More functions where a derivative is above what that of a tanh can be."""
    z = h.detach().requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(z).sum(), z)
    return torch.tanh(torch.tanh(h)) if float(slope.max()) > 1 else torch.tanh(h)


def exact(h: Tensor, x: Tensor) -> Tensor:
    """Refuses every other rounding than its own."""
    if not torch.equal(h + h, 2 * h):
        raise ValueError("not what it was")
    return h - h.square()


@pytest.mark.parametrize(
    ("how", "vanished"),
    [
        (lambda h, x: torch.tanh(h), False),
        (lambda h, x: x + 0 * torch.tanh(h).detach(), False),  # nothing to differentiate
        (by_slope, True),
        (exact, True),
    ],
)
def test_nothing_is_claimed_of_derivatives_that_cannot_be_compared(
    how: Callable[[Tensor, Tensor], Tensor], vanished: bool
) -> None:
    x = torch.tensor([[0.5, -1.0], [1.5, 0.25], [-0.5, 1.0]], dtype=torch.float64)
    model = Branching(how).double()
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[1.0, 0.5], [-0.5, 1.0]]))
        model.layer.bias.copy_(torch.tensor([0.25, -0.25]))
    risk = bnp.EmpiricalRisk(model, F.mse_loss, (x, torch.zeros(3, 2)))
    assert has_vanished(risk) == vanished
