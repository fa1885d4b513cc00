"""The truth suite runs, finds no false claim, and would find one.

Bugs that only these tests catch: a suite that passes whatever the methods say; an answer in extended precision that is
wrong itself; an interrupt that loses what was done; a false two-sided claim on the quick part of the suite.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch

from bnp_analysis.linalg.condition import factor_svd, golub_kahan
from bnp_analysis.testing import random_orthogonal, spectrum

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    if not SUITE.is_dir():
        pytest.skip("the benchmarks are not part of this installation")
    monkeypatch.syspath_prepend(str(SUITE))
    import truth_arithmetic

    if not truth_arithmetic.PRECISE:
        pytest.skip("long double is no more precise than float64 here")


def run(words: str, out: Path) -> tuple[int, dict[str, Any]]:
    import truth_suite

    status = truth_suite.main(["--only", words, "--out", str(out)])
    return status, json.loads((out / "truth_suite.json").read_text())


def test_the_quick_suite_finds_no_false_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import truth_chances
    import truth_nullity
    import truth_suite

    # Fewer starts and examples than by `--quick`: factors of 60 examples are tall too.
    monkeypatch.setattr(truth_chances, "tally", lambda starts, tally=truth_chances.tally: tally(4))
    monkeypatch.setattr(truth_nullity, "counts", partial(truth_nullity.counts, 60))
    assert truth_suite.main(["--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "truth_suite.json").read_text())
    total = record["totals"]
    assert (total["two_sided_violations"], total["one_sided_violations"]) == (0, 0)
    assert total["problems"] >= 50
    assert total["two_sided"] >= 120, "bounds that are never finite are no evidence"
    assert all(claim["within"] for claim in record["chances"])
    assert all(network["unexplained"] >= 0 for network in record["nullity"])
    page = (tmp_path / "truth_suite.md").read_text()
    assert "two-sided intervals, 0 of them false" in page
    for line in record["accuracy"]:
        if "relative error" in line["line"] or "the claim holds" in line["line"]:
            assert line["met"] == line["runs"] > 0, line


@pytest.mark.parametrize("method", ["factor-svd", "golub-kahan"])
def test_a_false_claim_is_found(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its `|P|` term the certificate misses the truth, and the suite says so."""
    if method == "factor-svd":
        true_radius = factor_svd.singular_value_radius
        monkeypatch.setattr(
            factor_svd,
            "singular_value_radius",
            lambda largest, shape, forming: 0.01 * true_radius(largest, shape, 0.0),
        )
    else:
        monkeypatch.setattr(golub_kahan, "factor_rounding_norm", lambda F, seed=0: 0.0)
    status, record = run("dense P, |P| 1e+05", tmp_path)
    assert status == 1
    assert record["totals"]["two_sided_violations"] > 0
    bad = {row["method"] for row in record["rows"] if not row.get("holds", True)}
    # A reduced factor is judged by the same radius.
    assert bad == ({method, "reduced"} if method == "factor-svd" else {method})
    assert "FALSE" in (tmp_path / "truth_suite.md").read_text()


def test_what_is_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import truth_methods

    real, seen = truth_methods.run, []

    def impatient(*arguments: Any) -> dict[str, Any]:
        seen.append(arguments)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(truth_methods, "run", impatient)
    _, record = run("constructed log, n 64, kappa 1e+03", tmp_path)
    assert len(record["rows"]) == 3
    assert record["state"].startswith("interrupted at problem 1 of")
    assert "interrupted at problem 1" in (tmp_path / "truth_suite.md").read_text()


def test_extended_precision_is_right(generator: torch.Generator) -> None:
    """Against 60 digits: far below what float64 resolves."""
    from truth_arithmetic import eigenvalues, error, long, singular_values

    F = random_orthogonal(14, generator)[:, :10] * spectrum("log", 10, 1e14).sqrt() @ random_orthogonal(10, generator)
    H = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    H = H + H.T
    with mpmath.workdps(60):
        exact = sorted(mpmath.svd_r(mpmath.matrix(F.tolist()), compute_uv=False), reverse=True)
        values = mpmath.eigsy(mpmath.matrix(H.tolist()), eigvals_only=True)
        found = singular_values(long(F))
        allowed = error(found, (14, 10))
        assert allowed < 1e-16
        for ours, theirs in zip(found, exact, strict=True):
            assert abs(mpmath.mpf(float(ours)) + mpmath.mpf(float(ours - float(ours))) - theirs) <= allowed
        for i, ours in enumerate(eigenvalues(long(H))):
            assert abs(mpmath.mpf(float(ours)) + mpmath.mpf(float(ours - float(ours))) - values[i]) <= 1e-17 * 40


def test_products_are_exact(generator: torch.Generator) -> None:
    """Where extended precision alone would lose eight digits to cancellation."""
    from truth_arithmetic import exact_product

    P = random_orthogonal(6, generator) * spectrum("log", 6, 1e8, scale=1e8) @ random_orthogonal(6, generator)
    F = random_orthogonal(6, generator) @ torch.linalg.inv(P)
    with mpmath.workdps(60):
        exact = mpmath.matrix(F.tolist()) * mpmath.matrix(P.tolist())
        for i, row in enumerate(exact_product(F, P)):
            for j, ours in enumerate(row):
                assert abs(mpmath.mpf(float(ours)) + mpmath.mpf(float(ours - float(ours))) - exact[i, j]) <= 1e-18


def test_constructions_are_what_they_say() -> None:
    """The prescribed values are the singular values of what is stored, every one."""
    from truth_arithmetic import long, singular_values
    from truth_problems import exact_factor, sigmas, signs

    for n in (1, 4, 7, 50, 64):
        Q = signs(n, torch.Generator().manual_seed(n))
        assert torch.equal(Q.T @ Q, torch.eye(n, dtype=torch.float64))
    for kind in ("log", "isolated", "clustered", "repeated", "two-scale", "flat"):
        values = sigmas(kind, 13, 20)
        F, null = exact_factor(values, 20, 16, torch.Generator().manual_seed(0))
        assert torch.equal(F @ null, torch.zeros(20, 3, dtype=torch.float64))
        found = singular_values(long(F))
        assert max(abs(float(a) - float(b)) for a, b in zip(found, values, strict=False)) <= 1e-18
        assert abs(values[0] / values[-1] - (1 if kind == "flat" else 2**20)) <= 2**20 * 4e-3


@pytest.mark.parametrize("shift", [1, 0], ids=["as it is", "ratios shifted by one"])
def test_profiles_of_networks_are_true_and_false_ones_would_be_found(
    shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import profiles

    monkeypatch.setattr(profiles, "KINDS", {"ReLU": profiles.KINDS["ReLU"]})
    monkeypatch.setattr(profiles, "prescribed", lambda quick: iter(()))
    if not shift:
        real = profiles.magnitudes
        monkeypatch.setattr(profiles, "magnitudes", lambda A, P: (real(A, P)[0][1:], real(A, P)[1]))
    assert profiles.main(["--quick", "--out", str(tmp_path)]) == (0 if shift else 1)
    assert (", 0 false" in (tmp_path / "profiles.md").read_text()) is bool(shift)
