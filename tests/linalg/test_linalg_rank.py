"""The stochastic rank: a count that forgets the dimension, ignores the threshold or hides its doubt is caught here."""

from __future__ import annotations

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.testing import symmetric_with_spectrum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_counts_what_lies_above_the_threshold(dtype: torch.dtype, generator: torch.Generator) -> None:
    values = torch.cat([torch.linspace(1, 3, 50), torch.full((30,), 1e-2), torch.zeros(40)]).double()
    A = symmetric_with_spectrum(values, generator, dtype=dtype).operator
    every = bnp.rank_estimate(A, probes=40, seed=1)
    assert abs(every.value - 80) < 4 * every.error + 1e-6
    large = bnp.rank_estimate(A, probes=40, threshold=0.5, seed=1)
    assert abs(large.value - 50) < 4 * large.error + 1e-6
    assert large.value < every.value
    assert large.unresolved > 50 - 4 * large.error


def test_errors_shrink_with_probes_and_bad_thresholds_are_refused(generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(torch.cat([torch.ones(60), torch.zeros(60)]).double(), generator).operator
    few, many = (bnp.rank_estimate(A, probes=probes) for probes in (8, 200))
    assert many.error < few.error
    assert abs(many.value - 60) < 4 * many.error + 1e-6
    with pytest.raises(InvalidInputError, match="threshold"):
        bnp.rank_estimate(A, threshold=0.0)
