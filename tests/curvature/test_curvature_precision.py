"""Catches: an interval of float64 width around products that pass through float32; a statement about a spectrum from
bfloat16 or float16 products; blocks, units, reduced factors and tables that forget what the whole network knows.

Truth: the same network without the cast, in float64; its intervals are seven decades narrower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.condition.reduction import reduced
from bnp_analysis.network import coverage

SINGLE, DOUBLE = torch.float32, torch.float64


class Acts(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def softmax(h: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.softmax(h, -1, dtype=dtype).to(h.dtype)


def layer_norm(h: Tensor, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(h.to(dtype), h.shape[-1:]).to(h.dtype)


def branch(h: Tensor, dtype: torch.dtype) -> Tensor:
    return h + 0.3 * torch.tanh(h.to(dtype)).to(h.dtype)


def attend(h: Tensor, dtype: torch.dtype) -> Tensor:
    q = h.to(dtype).view(-1, 2, 3)
    return (torch.softmax(q @ q.mT, -1) @ q).flatten(1).to(h.dtype)


KINDS = [softmax, layer_norm, branch, attend]


def problem(kind: Callable[[Tensor, torch.dtype], Tensor], inside: torch.dtype, seed: int = 0) -> bnp.EmpiricalRisk:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), Acts(lambda h: kind(h, inside)), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=DOUBLE))
    x, y = 2 + torch.randn(30, 6, generator=g, dtype=DOUBLE), torch.randint(3, (30,), generator=g)
    return bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))


@pytest.mark.parametrize(("kind", "seed"), [(kind, place % 2) for place, kind in enumerate(KINDS)])
def test_intervals_contain_the_truth(kind: Callable[[Tensor, torch.dtype], Tensor], seed: int) -> None:
    exact, rough = problem(kind, DOUBLE, seed), problem(kind, SINGLE, seed)
    for block in ("0", "2"):
        known = bnp.null_directions(exact, block=block)
        truth = bnp.condition_number(bnp.gauss_newton(exact, block=block), null=known, method="factor-svd")
        A, null = bnp.gauss_newton(rough, block=block), bnp.null_directions(rough, block=block)
        for method in ("factor-svd", "dense", "golub-kahan", "lanczos"):
            found = bnp.condition_number(A, null=null, method=method)
            assert truth.dtype == "float64"
            assert found.dtype == "float64 (float32 inside)"
            if truth.two_sided:
                assert found.lower <= truth.upper
                assert truth.lower <= found.upper
                assert not found.lower > found.value
            assert "float64 (float32 inside)" in str(found)


def test_a_float32_softmax_still_gives_a_two_sided_number() -> None:
    rough = problem(softmax, SINGLE, 2)
    found = bnp.condition_number(bnp.gauss_newton(rough, block="0"), null=bnp.null_directions(rough, block="0"))
    truth = problem(softmax, DOUBLE, 2)
    exact = bnp.condition_number(bnp.gauss_newton(truth, block="0"), null=bnp.null_directions(truth, block="0"))
    assert found.two_sided
    assert exact.two_sided
    assert found.lower <= exact.value <= found.upper
    assert found.upper - found.lower > 1e3 * (exact.upper - exact.lower)
    assert found.engine["precision"] == str(rough.precision)
    assert "1" in str(rough.precision)


def test_every_operator_of_a_risk_knows() -> None:
    risk = problem(layer_norm, SINGLE)
    eps = torch.finfo(SINGLE).eps
    A = bnp.gauss_newton(risk)
    units = unit_blocks(risk, coverage(risk))["2"]
    whole = units.whole
    assert whole is not None
    P = bnp.bnp_preconditioner(risk)
    operators: list[Any] = [
        A, A.factor, bnp.hessian(risk), bnp.fisher(risk), bnp.gauss_newton(risk, block=("0", 1)), units[0],
        units[0].factor, whole, reduced(A), reduced(units[1]), bnp.linalg.congruence(A, P), A.factor @ P,
    ]  # fmt: skip
    assert all(1 <= operator.eps / eps <= 8 for operator in operators)
    assert bnp.hessian(problem(layer_norm, DOUBLE)).eps <= 8 * torch.finfo(DOUBLE).eps


def test_tables_say_so_and_contain_the_truth() -> None:
    rough, exact = problem(layer_norm, SINGLE), problem(layer_norm, DOUBLE)
    table, truth = bnp.layer_table(rough), bnp.layer_table(exact)
    assert table.settings["precision"] == "float32 (native_layer_norm in 1)"
    for found, known in zip(table.layers, truth.layers, strict=True):
        pairs = [(found.block, known.block), *zip(found.unit_blocks, known.unit_blocks, strict=True)]
        pairs += [(found.block_with_P, known.block_with_P)]
        for k, t in pairs:
            assert k is not None
            assert t is not None
            assert k.dtype == "float64 (float32 inside)"
            if t.two_sided:
                assert k.lower <= t.upper
                assert t.lower <= k.upper


def test_outputs_in_a_coarser_dtype_have_a_curvature() -> None:
    """`logits.float()`: the factor and its null directions are those of softmax cross-entropy."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=g), torch.randint(3, (20,), generator=g)
    layer = nn.Linear(4, 3)
    head = nn.Sequential(layer, Acts(lambda o: o.float()))
    rough = bnp.EmpiricalRisk(head, F.cross_entropy, (x, y), dtype=DOUBLE)
    exact = bnp.EmpiricalRisk(layer, F.cross_entropy, (x, y), dtype=DOUBLE)
    numbers = [bnp.condition_number(bnp.gauss_newton(r), null=bnp.null_directions(r)) for r in (rough, exact)]
    assert numbers[0].two_sided
    assert numbers[0].rank == numbers[1].rank == 10
    assert numbers[0].lower <= numbers[1].value <= numbers[0].upper


VERBS: dict[str, Callable[[bnp.EmpiricalRisk], Any]] = {
    "condition number": lambda r: bnp.condition_number(bnp.gauss_newton(r)),
    "magnitudes": lambda r: bnp.linalg.magnitude_condition_number(bnp.hessian(r)),
    "regularized": lambda r: bnp.linalg.regularized_condition_number(bnp.gauss_newton(r), 0.1),
    "a unit": lambda r: bnp.condition_number(bnp.gauss_newton(r, block=("0", 1))),
    "eigenpairs": lambda r: bnp.eigenpairs(bnp.hessian(r), k=1),
    "density": lambda r: bnp.spectral_density(bnp.hessian(r), probes=1, steps=4),
    "trace": lambda r: bnp.trace(bnp.hessian(r)),
    "null directions": bnp.null_directions,
    "table": lambda r: bnp.layer_table(r, dtype=None),
    "comparison": lambda r: bnp.compare(r, dtype=None),
}


@pytest.mark.parametrize("verb", VERBS)
def test_too_few_digits_are_refused_in_words(verb: str) -> None:
    inside = torch.float16 if verb in ("condition number", "table") else torch.bfloat16
    with pytest.raises(InvalidInputError, match=rf"{str(inside)[6:]}.*digits.*[Ff]loat64"):
        VERBS[verb](problem(branch, inside))


def test_a_half_precision_model_is_refused_and_measured_in_float64() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    data = torch.randn(20, 4, generator=g).to(torch.bfloat16), torch.randint(2, (20,), generator=g)
    half = bnp.EmpiricalRisk(model, F.cross_entropy, data)
    with pytest.raises(InvalidInputError, match=r"bfloat16.*which keeps 2 digits"):
        bnp.eigenpairs(bnp.hessian(half), k=1)
    exact = half.to(DOUBLE)
    assert bnp.hessian(half).to_dense().dtype == torch.bfloat16
    assert str(exact.precision) == "float64"
    largest = float(torch.linalg.eigvalsh(bnp.hessian(exact).to_dense())[-1])
    assert float(bnp.eigenpairs(bnp.hessian(exact), k=1).values[0]) == pytest.approx(largest, rel=1e-9)


def test_theory_is_not_tried_on_rounded_products() -> None:
    checks = bnp.check_theory(problem(softmax, SINGLE), only=["T1"]).checks
    assert {check.verdict for check in checks} == {"not applicable"}
    assert "float32 (softmax in 1)" in checks[0].reason


def centered(offset: float) -> Callable[[Tensor, torch.dtype], Tensor]:
    """Batch normalization of values far from zero: what is rounded is much larger than what is left."""

    def normalize(h: Tensor, dtype: torch.dtype) -> Tensor:
        z = h.to(dtype) + offset
        c = z - z.mean(0, keepdim=True)
        return (c * torch.rsqrt((c * c).mean(0, keepdim=True) + 1e-5)).to(h.dtype)

    return normalize


@pytest.mark.parametrize(("offset", "seed"), [(1.0, 0), (2e2, 1)])  # hardly any cancellation, and all but too much
def test_what_cancels_after_a_cast_counts(offset: float, seed: int) -> None:
    rough, exact = problem(centered(offset), SINGLE, seed), problem(centered(0.0), DOUBLE, seed)
    for block in ("0", "2"):
        pair = [bnp.condition_number(bnp.gauss_newton(r, block=block)) for r in (rough, exact)]
        # One-sided without null directions: no value but the lower bounds, and those of float64 are the truth.
        assert pair[0].lower <= pair[1].value * (1 + 1e-9)
    known = [bnp.null_directions(r, block="2") for r in (rough, exact)]
    found, truth = (
        bnp.condition_number(bnp.gauss_newton(r, block="2"), null=null)
        for r, null in zip((rough, exact), known, strict=True)
    )
    assert truth.two_sided
    assert found.lower <= truth.value <= found.upper


def test_what_leaves_no_digits_is_refused() -> None:
    far = problem(centered(1e4), SINGLE)
    with pytest.raises(InvalidInputError, match="digits"):
        bnp.condition_number(bnp.gauss_newton(far))
