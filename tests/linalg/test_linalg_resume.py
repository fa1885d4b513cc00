"""Runs on disk: a resumed run that differs from an uninterrupted one in a single bit, resumes with another operator, or
loses what it had on Ctrl-C is caught here, for every run that can be saved."""

from __future__ import annotations

import linecache
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import CallableOperator, lanczos
from bnp_analysis.linalg.krylov.bidiagonal import golub_kahan
from bnp_analysis.runtime import files

N = 120


def operator(stop_after: int | None = None, factor: float = 1.0) -> CallableOperator:
    """A diagonal operator that a user interrupts after some products."""
    diagonal = factor * torch.logspace(0, -3, N, dtype=torch.float64)
    count = 0

    def product(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if stop_after is not None and count > stop_after:
            raise KeyboardInterrupt
        return diagonal * v

    return CallableOperator(product, N, dtype=torch.float64)


def test_lanczos(tmp_path: Path) -> None:
    whole = lanczos(operator(), 80, seed=3)
    first = lanczos(operator(stop_after=33), 80, seed=3, checkpoint=tmp_path / "l.pt")
    assert first.stop == "interrupted"
    rest = lanczos(operator(), 80, seed=3, checkpoint=tmp_path / "l.pt")
    np.testing.assert_array_equal(rest.alpha, whole.alpha)
    np.testing.assert_array_equal(rest.beta, whole.beta)
    assert torch.equal(rest.basis, whole.basis)
    # One product more: it tells that the file belongs to this operator.
    assert rest.matvecs == whole.matvecs + 1


def test_condition_number_by_lanczos(tmp_path: Path) -> None:
    whole = bnp.condition_number(operator(), method="lanczos", steps=90)
    path = tmp_path / "k.pt"
    early = bnp.condition_number(operator(stop_after=40), method="lanczos", steps=90, checkpoint=path)
    assert early.stop == "interrupted"
    assert early.lower <= whole.lower
    late = bnp.condition_number(operator(), method="lanczos", steps=90, checkpoint=path)
    assert (late.value, late.lower, late.upper) == (whole.value, whole.lower, whole.upper)


def test_eigenpairs(tmp_path: Path) -> None:
    whole = bnp.eigenpairs(operator(), k=4, tol=1e-10, seed=1)
    path = tmp_path / "e.pt"
    bnp.eigenpairs(operator(stop_after=30), k=4, tol=1e-10, seed=1, checkpoint=path)
    late = bnp.eigenpairs(operator(), k=4, tol=1e-10, seed=1, checkpoint=path)
    torch.testing.assert_close(late.values, whole.values, rtol=1e-12, atol=0)
    assert late.stop == "converged"


def test_spectral_density(tmp_path: Path) -> None:
    whole = bnp.spectral_density(operator(), probes=6, steps=20, seed=2)
    path = tmp_path / "d.pt"
    early = bnp.spectral_density(operator(stop_after=70), probes=6, steps=20, seed=2, checkpoint=path)
    assert len(early.nodes) == 3
    late = bnp.spectral_density(operator(), probes=6, steps=20, seed=2, checkpoint=path)
    np.testing.assert_array_equal(late.nodes, whole.nodes)
    np.testing.assert_array_equal(late.density, whole.density)
    assert late.matvecs == whole.matvecs + 1


def test_the_axis_may_be_logarithmic() -> None:
    A = operator()
    decades = bnp.spectral_density(A, probes=30, steps=60, scale="log", width=0.2)
    # Log-spaced eigenvalues are uniform on this axis: 1/3 per decade.
    inside = (decades.grid > -2.5) & (decades.grid < -0.5)
    assert abs(decades.density[inside].mean() - 1 / 3) < 0.05
    with pytest.raises(InvalidInputError, match="scale"):
        bnp.spectral_density(A, scale="logarithmic")


RUNS: dict[str, Callable[[CallableOperator, Path], object]] = {
    "lanczos": lambda A, path: lanczos(A, 40, checkpoint=path),
    "eigenpairs": lambda A, path: bnp.eigenpairs(A, k=2, checkpoint=path),
    "density": lambda A, path: bnp.spectral_density(A, probes=2, steps=10, checkpoint=path),
}


@pytest.mark.parametrize("run", [lanczos, golub_kahan])
def test_slow_products_are_saved_before_there_are_fifty(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 30 seconds by a clock that a product moves on by 11, so after every third; and at the end."""
    now, saved = [0.0], []
    save = files.torch.save
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files.torch, "save", lambda *a: saved.append(now[0]) or save(*a))

    def slow(v: Tensor) -> Tensor:
        now[0] += 11.0
        return torch.logspace(0, -3, N, dtype=torch.float64) * v

    run(CallableOperator(slow, N, dtype=torch.float64), 12, checkpoint=tmp_path / "run.pt")
    assert len(saved) >= 5
    assert max(b - a for a, b in pairwise(saved)) <= 44.0


@pytest.mark.parametrize("name", RUNS)
def test_a_file_of_another_run_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    RUNS[name](operator(), path)
    with pytest.raises(InvalidInputError, match="another"):
        RUNS[name](operator(factor=1.5), path)
    RUNS[name](operator(), path)
    with pytest.raises(InvalidInputError, match="another run"):
        RUNS["lanczos" if name != "lanczos" else "density"](operator(), path)
    path.write_bytes(b"damaged")
    with pytest.raises(InvalidInputError, match="not a saved run"):
        RUNS[name](operator(), path)


def test_a_run_whose_tridiagonal_matrix_has_no_diagonal_goes_on(tmp_path: Path) -> None:
    """`[[0, B], [B^T, 0]]` from a start in one half: the Rayleigh quotients are rounding, no measure of its size."""
    B = torch.randn(N // 2, N // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.cat([torch.ones(N // 2, dtype=torch.float64), torch.zeros(N // 2, dtype=torch.float64)])

    def run(steps: int, scale: float = 1.0) -> Any:
        A = CallableOperator(lambda v: scale * torch.cat([B @ v[N // 2 :], B.T @ v[: N // 2]]), N, dtype=torch.float64)
        return lanczos(A, steps, start=start, checkpoint=tmp_path / "run.pt")

    assert np.abs(run(9).alpha).max() < 1e-12
    again = run(20)
    assert again.alpha.size == 20
    assert again.matvecs == 21


FINISHED: dict[str, Callable[[CallableOperator, Path | None], Any]] = {
    "lanczos": lambda A, path: lanczos(A, 30, seed=1, checkpoint=path).basis,
    "lanczos until": lambda A, path: lanczos(A, 30, until=lambda run: len(run.alpha) >= 10, checkpoint=path).basis,
    "eigenpairs": lambda A, path: bnp.eigenpairs(A, k=3, tol=1e-8, seed=1, checkpoint=path).vectors,
    "golub-kahan": lambda A, path: golub_kahan(A, 30, seed=1, checkpoint=path).right,
}


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_file_gives_the_same_vectors(name: str, tmp_path: Path) -> None:
    whole = FINISHED[name](operator(), tmp_path / "run.pt")
    assert torch.equal(FINISHED[name](operator(), tmp_path / "run.pt"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", FINISHED)
def test_ctrl_c_at_any_line_leaves_a_usable_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal at lines of the package all along a run; where it comes twice, the second one ends the run at once."""
    monkeypatch.setattr(files, "_EVERY", 5)
    whole, total = FINISHED[name](operator(), None), 0

    def count(frame: Any, event: str, arg: object) -> Any:
        nonlocal total
        if "bnp_analysis" not in frame.f_code.co_filename:
            return None
        # A block's `with` is a line again when it ends, before its exit is called: no signal is handled there.
        if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(
            "with"
        ):
            total += 1
            if total in at:
                signal.raise_signal(signal.SIGINT)
        return count

    def traced(path: Path) -> None:
        nonlocal total
        total = 0
        tracer = sys.gettrace()  # of coverage, if that is measured
        sys.settrace(count)
        try:
            FINISHED[name](operator(), path)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracer)

    at: set[int] = set()
    traced(tmp_path / "length.pt")
    length, before = total, signal.getsignal(signal.SIGINT)
    for trial in range(8):
        first = (2 * trial + 1) * length // 16
        at = {first, first + 3} if trial % 2 else {first}
        path = tmp_path / f"{trial}.pt"
        traced(path)
        assert signal.getsignal(signal.SIGINT) == before
        assert torch.equal(FINISHED[name](operator(), path), whole), at
        assert sorted(tmp_path.glob(".*")) == []


def test_a_state_with_a_missing_or_wrong_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    lanczos(operator(), 20, checkpoint=path)
    saved = torch.load(path)
    for change, word in (({"alpha": None}, "alpha"), ({"w": saved["state"]["w"] * torch.nan}, "state.w")):
        state = {n: v for n, v in (saved["state"] | change).items() if v is not None}
        torch.save(saved | {"state": state}, path)
        with pytest.raises(InvalidInputError, match=rf"run\.pt is not a saved run, or damaged \(.*{word}"):
            lanczos(operator(), 20, checkpoint=path)
