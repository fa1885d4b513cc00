"""Runs that are killed in the middle go on in another process and end with the same numbers, bit for bit.

Bugs that only these tests catch: a state that is written only on a clean way out, or that forgets random numbers,
counts or open residuals; a file that a kill leaves half-written; a resumed search that looks elsewhere than before.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bnp_analysis as bnp
from bnp_analysis.linalg import CallableOperator, GramOperator, MatrixOperator

# Also run as a program: `python this_file NAME FOLDER` computes slowly until it is killed.
N = 150


class Held(MatrixOperator):
    """A diagonal factor whose products become slow after a while."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__(torch.diag(torch.logspace(0, -4, N, dtype=torch.float64)))
        self.folder, self.count = folder, 0

    def _matmat(self, x: Tensor) -> Tensor:
        hold(self)
        return super()._matmat(x)


def hold(operator: Any) -> None:
    """Past the first save, wait for the kill."""
    operator.count += 1
    if operator.folder is not None and operator.count > 75:
        (operator.folder / "reached").touch()
        time.sleep(0.5)


def symmetric(folder: Path | None) -> CallableOperator:
    values = torch.logspace(0, -5, N, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        hold(A)
        return values * v

    A = CallableOperator(product, N, dtype=torch.float64)
    A.folder, A.count = folder, 0
    return A


RUNS: dict[str, Callable[[Path | None, Path], Any]] = {
    "eigenpairs": lambda folder, file: bnp.eigenpairs(
        symmetric(folder), 6, which="smallest", tol=1e-9, seed=2, checkpoint=file
    ),
    "density": lambda folder, file: bnp.spectral_density(symmetric(folder), probes=6, steps=20, checkpoint=file),
    "lanczos": lambda folder, file: bnp.condition_number(
        symmetric(folder), method="lanczos", steps=110, checkpoint=file
    ),
    "golub-kahan": lambda folder, file: bnp.condition_number(
        GramOperator(Held(folder)), method="golub-kahan", steps=110, checkpoint=file
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_numbers(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, __file__, name, str(folder)],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    limit = time.monotonic() + 120
    while not (folder / "reached").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (folder / "run.pt").exists(), "nothing was saved before the kill"
    resumed, whole = RUNS[name](None, folder / "run.pt"), RUNS[name](None, tmp_path / "whole.pt")
    assert resumed.matvecs >= whole.matvecs
    # Equal to the last bit, but for the product that told whose file it is.
    assert dataclasses.replace(resumed, matvecs=whole.matvecs) == whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    RUNS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[2]) / "run.pt")
