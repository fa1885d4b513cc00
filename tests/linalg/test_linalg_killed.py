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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bnp_analysis as bnp
from bnp_analysis.linalg import CallableOperator, GramOperator, MatrixOperator

# Also run as a program: `python this_file NAME=FOLDER ...` computes slowly until it is killed.
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Where each run keeps its state; all are under way, in processes of their own, forked where torch is loaded."""
    made = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    words = [f"{name}={folder}" for name, folder in made.items()]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, __file__, *words], env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ) as parent:
        try:
            yield made
        finally:
            for pid in (folder / "pid" for folder in made.values()):
                if pid.exists():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid.read_text()), signal.SIGKILL)
            parent.kill()


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_numbers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder, limit = folders[name], time.monotonic() + 120
    while not (folder / "reached").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    while not (folder / "ended").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert int((folder / "ended").read_text()) == -signal.SIGKILL
    assert (folder / "run.pt").exists(), "nothing was saved before the kill"
    resumed, whole = RUNS[name](None, folder / "run.pt"), RUNS[name](None, tmp_path / "whole.pt")
    assert resumed.matvecs >= whole.matvecs
    # Equal to the last bit, but for the product that told whose file it is.
    assert dataclasses.replace(resumed, matvecs=whole.matvecs) == whole


def main(words: list[str]) -> None:
    """Start every run in a fork; say when one has ended, and how."""
    torch.set_num_threads(1)
    started: dict[int, Path] = {}
    for name, _, path in (word.partition("=") for word in words):
        folder = Path(path)
        if (pid := os.fork()) == 0:
            (folder / "pid").write_text(str(os.getpid()))
            RUNS[name](folder, folder / "run.pt")
            os._exit(0)
        started[pid] = folder
    while started:
        pid, status = os.wait()
        folder = started.pop(pid)
        (folder / "status").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / "status").rename(folder / "ended")


if __name__ == "__main__":
    main(sys.argv[1:])
