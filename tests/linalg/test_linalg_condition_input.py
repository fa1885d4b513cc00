"""Bad input gets an error that says what is wrong; a result says in words how it knows, and survives a file.

Bugs that only these tests catch: an empty, zero, unsymmetric or NaN operator that yields a number; a null space of
the wrong shape that is broadcast; a message that names no way on; a bound that a file loses.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from linalg_problems import counting, none_null
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError, NullSpaceError, ZeroOperatorError
from bnp_analysis.linalg import (
    CallableOperator,
    ConditionNumber,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    IdentityPreconditioner,
    MatrixOperator,
    condition_number,
    magnitude_condition_number,
)
from bnp_analysis.testing import spectrum, symmetric_with_spectrum

MEASURES = pytest.mark.parametrize("measure", [condition_number, magnitude_condition_number])
METHODS = pytest.mark.parametrize("method", ["dense", "lanczos"])


@MEASURES
def test_what_is_no_operator(measure: object) -> None:
    ways = (torch.eye(3), "DenseOperator"), (MatrixOperator(torch.eye(3)), "GramOperator"), (None, "DenseOperator")
    for A, way in ways:
        with pytest.raises(InvalidInputError, match=rf"A must be a SymmetricOperator, not .*: write .*{way}\("):
            measure(A)  # type: ignore[operator]


@MEASURES
@METHODS
def test_an_empty_operator(measure: object, method: str) -> None:
    with pytest.raises(InvalidInputError, match=r"R\^0 has no eigenvalues"):
        measure(DenseOperator(torch.zeros(0, 0)), method=method)  # type: ignore[operator]


@MEASURES
@METHODS
def test_a_zero_operator(measure: object, method: str) -> None:
    for A in (DenseOperator(torch.zeros(4, 4)), CallableOperator(lambda v: 0 * v, 4)):
        for null in (None, none_null(4, torch.float32), torch.eye(4)[:, :2]):
            with pytest.raises(ZeroOperatorError, match="zero"):
                measure(A, null=null, method=method)  # type: ignore[operator]


def test_a_zero_factor() -> None:
    for rows in (torch.zeros(3, 4), torch.zeros(0, 4)):
        with pytest.raises(ZeroOperatorError, match="zero to rounding"):
            condition_number(GramOperator(MatrixOperator(rows)))


@MEASURES
@METHODS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
def test_an_unsymmetric_function(
    measure: object, method: str, dtype: torch.dtype, scale: float, generator: torch.Generator
) -> None:
    good = symmetric_with_spectrum(scale * spectrum("log", 30, 10.0), generator, dtype=dtype).operator.to_dense()
    bad = good.clone()
    bad[3, 7] += (1e-6 if dtype == torch.float64 else 0.1) * scale
    measure(CallableOperator(lambda v: good @ v, 30, dtype=dtype), method=method)  # type: ignore[operator]
    with pytest.raises(InvalidInputError, match="is not symmetric"):
        measure(CallableOperator(lambda v: bad @ v, 30, dtype=dtype), method=method)  # type: ignore[operator]


@MEASURES
@METHODS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_products_that_are_not_finite(measure: object, method: str, bad: float, generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 30, 10.0), generator).operator

    def spoil(v: Tensor) -> Tensor:
        v[5] = bad
        return v

    for product in (1, 2, 17):
        with pytest.raises(NonFiniteError):
            measure(counting(A, {product: spoil}), method=method)  # type: ignore[operator]


def test_factors_that_are_not_finite() -> None:
    F = torch.ones(3, 2)
    F[1, 1] = math.nan
    with pytest.raises(NonFiniteError, match="factor"):
        condition_number(GramOperator(MatrixOperator(F)))


@pytest.mark.parametrize(
    ("null", "error", "words"),
    [
        (torch.zeros(5, 1).double(), InvalidInputError, r"must be \(6, r\), got \(5, 1\)"),
        (torch.zeros(6, 1, 1).double(), InvalidInputError, "must be"),
        (torch.ones(6, 1), InvalidInputError, "float32"),
        ([1.0] * 6, InvalidInputError, "not list"),
        (torch.zeros(6, 1).double(), NullSpaceError, "zero or not finite"),
        (torch.full((6, 1), math.nan).double(), NullSpaceError, "zero or not finite"),
        (torch.ones(6, 2).double(), NullSpaceError, "linearly dependent"),
        (torch.ones(6, 7).double(), NullSpaceError, "dependent"),
    ],
)
def test_null_spaces_that_are_none(null: Tensor, error: type[Exception], words: str) -> None:
    A = DenseOperator(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0]).double()))
    for method in ("dense", "lanczos"):
        with pytest.raises(error, match=words):
            condition_number(A, null=null, method=method)


class Directions:
    """What `null=` takes beside a tensor."""

    def __init__(self, basis: Tensor, sources: dict[str, int]) -> None:
        self.basis, self.sources = basis, sources


@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
def test_ways_to_declare_a_null_space(method: str) -> None:
    A = DenseOperator(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]).double()))
    basis = torch.eye(5, dtype=torch.float64)[:, 3:]
    mixed = basis @ torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double() * 1e-30
    for null in (basis, mixed, Directions(basis, {"shift": 1, "dead": 1})):
        k = condition_number(A, null=null, method=method)
        # An object need not hold all directions, so a random start supports no bound.
        whole = isinstance(null, Tensor) or method != "lanczos"
        assert (k.null_dim, k.two_sided, round(k.value, 3)) == (2, whole, 3.0)
    assert k.null_sources == {"shift": 1, "dead": 1}
    one = condition_number(A, null=basis[:, 0], method="dense")
    assert (one.null_dim, one.null_sources) == (1, {"declared": 1})


def test_preconditioners_that_do_not_fit() -> None:
    A = DenseOperator(torch.eye(3))
    for P, words in (
        (IdentityPreconditioner(2, torch.float32), "acts on 2"),
        (IdentityPreconditioner(3, torch.float64), "float64"),
        (torch.eye(3), r"write bnp.linalg.DensePreconditioner\(matrix\)"),
        (DenseOperator(torch.eye(3)), "must be a Preconditioner"),
    ):
        for method in ("auto", "lanczos"):
            with pytest.raises(InvalidInputError, match=words):
                condition_number(A, preconditioner=P, method=method)  # type: ignore[arg-type]


def test_the_line_of_each_kind_of_result(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 12, 1e3, rank=10), generator, factor_rows=12)
    declared = condition_number(p.operator, null=p.null)
    lines = {
        "kappa* = 1000 (1000 .. 1000), factor-svd float64, rank 10 of 12, gap ": declared,
        "kappa* >= 1000, one-sided: 2 eigenvalues below the noise floor are not explained as zero "
        "(null space not declared); dense float64, rank 10 of 12": condition_number(p.operator, method="dense"),
        "kappa* >= ": condition_number(p.operator, method="lanczos", steps=4),
        "max|lambda|/min|lambda| = 1000 (1000 .. 1000), dense float64, rank 10 of 12, 0 negative, 2 zero": (
            magnitude_condition_number(p.operator, null=p.null)
        ),
    }
    for beginning, k in lines.items():
        assert str(k).startswith(beginning)
        assert repr(k) == f"<ConditionNumber: {k}>"
        assert "\n" not in str(k)
        assert str(k) in k._repr_html_().replace("&gt;", ">").replace("&lt;", "<").replace("&#x27;", "'")


def test_no_bound_at_all_is_said_in_words() -> None:
    tiny = torch.diag(torch.tensor([1.0, 1e-30, 1e-30])).double()
    k = condition_number(DenseOperator(tiny), null=none_null(3), method="lanczos", steps=3)
    assert k.upper == math.inf
    assert not k.two_sided
    assert "one-sided: after 2 steps the space is invariant to rounding" in str(k)
    # |P|^2 |A| is 1e12, and P^T A P has eigenvalues 1e-12 and 1e-6.
    A, P = (DenseOperator(torch.diag(torch.tensor([1.0, 1e-18])).double()), torch.tensor([1e-6, 1e6]).double())
    for null, also in ((none_null(2), ""), (None, "; null space not declared")):
        k = condition_number(A, preconditioner=DensePreconditioner(torch.diag(P)), null=null, method="lanczos")
        assert math.isnan(k.lower)
        assert k.upper == math.inf
        assert k.note.startswith(f"no Ritz value stands above the noise floor{also}")


def test_results_survive_a_file(tmp_path: Path, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 20, 1e3, rank=17), generator, factor_rows=20)
    P = DensePreconditioner(torch.diag(torch.linspace(1, 2, 20).double()))
    results = [
        condition_number(p.operator, null=p.null),
        condition_number(p.operator, preconditioner=P),
        condition_number(p.operator, method="dense"),
        condition_number(p.operator, method="lanczos", steps=5, seed=3),
        condition_number(p.operator, null=p.null, method="lanczos"),
        magnitude_condition_number(p.operator, method="lanczos"),
    ]
    for k in results:
        loaded = ConditionNumber.load(k.save(tmp_path / "k.json"))
        assert loaded == k
        assert str(loaded) == str(k)
        assert math.isnan(k.lower) or loaded.lower == k.lower
        assert loaded.upper == k.upper
        assert pickle.loads(pickle.dumps(k)) == k
        assert k.settings["preconditioned"] == (k is results[1])
        assert {"torch", "numpy", "bnp_analysis"} <= set(k.versions)
        assert k.seconds > 0
        assert k.to_dict()["value"] == k.value
        assert k.to_dataframe().shape[0] == 1
    with pytest.raises(FrozenInstanceError):
        results[0].value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("steps", [20, 60, 110])
def test_directions_that_are_not_all_support_no_false_bound(steps: int, generator: torch.Generator) -> None:
    values = torch.cat([torch.logspace(0, -4, 80, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)])
    made = symmetric_with_spectrum(values, generator)
    some = Directions(made.null[:, :30], {"found": 30})
    k = condition_number(made.operator, null=some, method="lanczos", steps=steps)
    assert k.lower <= 1e4 * (1 + 1e-9)
    assert k.upper == math.inf
    assert "need not be all" in k.note
