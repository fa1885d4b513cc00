"""Claims that rest on a random start, over many starts: how often they fail, against what they state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bnp_analysis.linalg import DenseOperator, condition_number, regularized_condition_number
from bnp_analysis.testing import spectrum, symmetric_with_spectrum


@dataclass(frozen=True)
class Claim:
    """A method on one problem: `measure(seed)` is what it says, `truth` a tiny range that holds the answer."""

    name: str
    stated: float
    truth: tuple[float, float]
    measure: Callable[[int], Any]
    most: int = 1000


def lanczos(kind: str, kappa: float, steps: int, stated: float, *, n: int = 50, rank: int = 40) -> Claim:
    p = symmetric_with_spectrum(spectrum(kind, n, kappa, rank=rank), torch.Generator().manual_seed(1))
    return Claim(
        f"lanczos, {kind}, kappa {kappa:g}, {steps} steps",
        stated,
        _around(kappa),
        lambda seed: condition_number(
            p.operator, null=p.null, method="lanczos", steps=steps, failure_probability=stated, seed=seed
        ),
    )


def undeclared(kind: str, kappa: float, steps: int) -> Claim:
    """No randomness is allowed to make this one fail: a lower bound from a start in the range."""
    p = symmetric_with_spectrum(spectrum(kind, 50, kappa, rank=40), torch.Generator().manual_seed(2))
    return Claim(
        f"lanczos, null space unknown, {kind}, kappa {kappa:g}, {steps} steps",
        0.0,
        _around(kappa),
        lambda seed: condition_number(p.operator, method="lanczos", steps=steps, seed=seed),
    )


def inverse(kind: str, kappa: float, stated: float, most: int) -> Claim:
    p = symmetric_with_spectrum(spectrum(kind, 30, kappa, rank=28), torch.Generator().manual_seed(3))
    return Claim(
        f"inverse-lanczos, {kind}, kappa {kappa:g}, 12 steps",
        stated,
        _around(kappa),
        lambda seed: condition_number(
            p.operator, null=p.null, method="inverse-lanczos", steps=12, failure_probability=stated, seed=seed
        ),
        most,
    )


def regularized(steps: int, stated: float) -> Claim:
    p = symmetric_with_spectrum(spectrum("log", 50, 1e4, rank=40), torch.Generator().manual_seed(4))
    A = DenseOperator(p.operator.to_dense())
    return Claim(
        f"lanczos, kappa(A + 0.1 I), {steps} steps",
        stated,
        _around(11.0),
        lambda seed: regularized_condition_number(
            A, 0.1, method="lanczos", steps=steps, failure_probability=stated, seed=seed
        ),
    )


def _around(kappa: float) -> tuple[float, float]:
    """Forming the matrix moved its eigenvalues by this much."""
    blur = 50 * 2.3e-16 * kappa
    return kappa * (1 - blur), kappa * (1 + blur)


def claims() -> list[Claim]:
    return [
        lanczos("log", 3.0, 8, 0.5),
        lanczos("isolated", 4.0, 8, 0.5),
        lanczos("two-scale", 10.0, 12, 0.5),
        lanczos("log", 10.0, 16, 0.05),
        lanczos("clustered", 10.0, 14, 0.05),
        regularized(6, 0.5),
        regularized(12, 0.05),
        inverse("log", 30.0, 0.5, 200),
        inverse("clustered", 1e4, 0.05, 1000),
        undeclared("log", 1e4, 15),
        undeclared("isolated", 1e6, 25),
        undeclared("log", 1e8, 45),
    ]


def tally(starts: int) -> Iterator[dict[str, Any]]:
    """A row for each claim: starts, how many gave both bounds, how many were false, what was stated."""
    for claim in claims():
        began = time.perf_counter()
        low, high = claim.truth
        both = false = 0
        count = min(starts, claim.most)
        for seed in range(count):
            k = claim.measure(seed)
            both += k.two_sided
            false += not ((math.isnan(k.lower) or k.lower <= high) and k.upper >= low)
        yield {
            "claim": claim.name,
            "starts": count,
            "two_sided": both,
            "false": false,
            "stated_probability": claim.stated,
            "within": false <= claim.stated * count,
            "seconds": time.perf_counter() - began,
        }
