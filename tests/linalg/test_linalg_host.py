"""Catches: a vector that stays on the host, or is refused there; bounds that forget what is rounded elsewhere.

No accelerator is needed: on torch's `meta` device tensors have no numbers, so none of it is mistaken for the host.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import (
    DenseOperator,
    DensePreconditioner,
    SymmetricOperator,
    condition_number,
    congruence,
    eigenpairs,
    on_host,
)
from bnp_analysis.linalg.derived import SymmetricOnHost
from bnp_analysis.linalg.spectra.checks import rounding_norm
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum


class _Elsewhere(SymmetricOperator):
    """The matrix `e e^T` on another device."""

    def __init__(self, n: int) -> None:
        super().__init__(n, torch.float64, "meta")
        self.seen: list[str] = []

    def _matmat(self, x: Tensor) -> Tensor:
        self.seen.append(x.device.type)
        return torch.ones(x.shape, dtype=torch.float64)


def test_vectors_travel_to_the_operator() -> None:
    A = _Elsewhere(4)
    B = on_host(A)
    v = torch.ones(4, dtype=torch.float64)
    assert (B.device.type, B.dtype, B.shape) == ("cpu", torch.float64, (4, 4))
    assert torch.equal(B @ v, v)
    assert torch.equal(B.T @ v.unsqueeze(1), v.unsqueeze(1))
    assert A.seen == ["meta", "meta"]


def test_what_is_on_the_host_stays_as_it_is() -> None:
    A = DenseOperator(torch.eye(3))
    assert on_host(A) is A
    with pytest.raises(InvalidInputError, match=r"or bnp.DenseOperator\(matrix\)"):
        on_host(torch.eye(3))


def test_results_and_bounds_are_those_of_the_operator(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 30, 1e4, rank=27), generator, factor_rows=40)
    P = DensePreconditioner(random_orthogonal(30, generator) * spectrum("log", 30, 1e2))
    A = congruence(p.operator, P)
    B = SymmetricOnHost(A)
    null = P.transport(p.null)
    assert rounding_norm(B) == rounding_norm(A)
    assert eigenpairs(B, 3, null=null).values.tolist() == eigenpairs(A, 3, null=null).values.tolist()
    for method in ("factor-svd", "dense", "lanczos"):
        one, other = (condition_number(C, method=method, null=null) for C in (A, B))
        assert (other.value, other.lower, other.upper) == pytest.approx((one.value, one.lower, one.upper), rel=1e-6)
