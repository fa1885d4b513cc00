"""Two processes measure what one measures, and the same bits each.

Bugs that only these tests catch: a sum over batches that ends before the other processes' batches (products, moments,
triangles, scales, diagonals), rows of a factor in another order than in one process, targets of the Monte Carlo Fisher
matrix that depend on who draws them, a process without data that has no shapes to contribute, statistics of layers that
run on one process only, a route or a null space that is chosen from one shard, results that differ between ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_jobs import trained
from shard_measurements import PROBLEMS, measured

from bnp_analysis.distributed import ALONE


def distance(a: Any, b: Any) -> float:
    """Relative for large numbers; infinite for what is no number and differs."""
    if isinstance(a, torch.Tensor | float):
        a, b = (torch.as_tensor(t, dtype=torch.float64) for t in (a, b))
        if a.shape != b.shape:
            return float("inf")
        return float((a - b).abs().max() / max(1.0, float(a.abs().max()))) if a.numel() else 0.0
    return 0.0 if a == b else float("inf")


def same_bits(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_processes_find_what_one_finds(problem: str, two: list[Any]) -> None:
    alone = measured(problem, ALONE)
    assert alone.keys() == two[0][problem].keys() == two[1][problem].keys()
    far = {name: d for name, value in alone.items() if not (d := distance(value, two[0][problem][name])) <= 1e-10}
    assert far == {}
    assert [name for name, value in two[0][problem].items() if not same_bits(value, two[1][problem][name])] == []
    split = (name for name, value in alone.items() if isinstance(value, torch.Tensor))
    assert any(not same_bits(alone[name], two[0][problem][name]) for name in split) or "empty" in problem


def test_estimated_output_scales_are_those_of_the_whole_batch(two: list[Any]) -> None:
    for name, value in trained(ALONE).items():
        assert distance(value, two[0]["training"][name]) < 1e-12
        assert same_bits(two[0]["training"][name], two[1]["training"][name])
