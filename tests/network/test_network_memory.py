"""Catches: a risk whose construction takes several times the memory of its data; a sum over the data that changes with
the pieces it is taken in; inputs that a model spoils because they were taken for a copy."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import bnp_analysis as bnp
from bnp_analysis.network import batches
from bnp_analysis.network.batches import hash_of

PEAK = """
import re, torch
import bnp_analysis as bnp
def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
model, loss = bnp.models.mlp([784, 4, 10]), torch.nn.functional.cross_entropy
for dtype in (torch.float32, torch.float64):
    x, y = torch.rand(200, 784), torch.arange(200) % 10
    bnp.EmpiricalRisk(model, loss, (x, y), dtype=dtype)  # what is loaded once
    x, y = torch.rand(20_000, 784), torch.arange(20_000) % 10
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = peak()
    risk = bnp.EmpiricalRisk(model, loss, (x, y), dtype=dtype)
    print((peak() - before) / (x.numel() * dtype.itemsize))
    del risk
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_construction_takes_a_copy_and_a_working_copy() -> None:
    """The copy that is kept, and the one that every batch is given as, to see whether the model writes into it."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    single, double = map(float, run.stdout.split())
    assert 0.9 < single < 3.0
    assert 0.9 < double < 3.0


def rows() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(50, 3, 4, generator=g)
    return [numbers, torch.arange(50), torch.randn(7, generator=g).double(), torch.tensor(3.0), numbers[:, 0] > 0]


@pytest.mark.parametrize("together", [1, 40, 1000])
def test_the_hash_does_not_depend_on_the_pieces(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hash_of(rows())
    assert whole[1] == 50
    monkeypatch.setattr(batches, "_TOGETHER", together)
    assert hash_of(rows()) == whole
    places = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    per_example = [t.ndim > 0 and len(t) == 50 for t in rows()]
    assert hash_of([t[places] if cut else t for t, cut in zip(rows(), per_example, strict=True)]) == whole
    assert hash_of([rows()[0][places], *rows()[1:]]) != whole


def test_a_network_that_writes_is_given_copies_of_copies() -> None:
    """The data it is asked about stay, also where it was given a copy already to find out what couples examples."""

    class Writes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mul_(2.0))

    x, y = torch.rand(9, 3), torch.arange(9) % 2
    risk = bnp.EmpiricalRisk(Writes(), torch.nn.functional.cross_entropy, (x, y))
    assert not risk.coupled
    assert torch.equal(next(iter(risk.batches)).x, x)
    assert torch.equal(risk.outputs, risk.outputs)
