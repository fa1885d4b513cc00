"""Two processes measure what one measures, with the same bits each, and what goes wrong in one of them ends both.

Bugs that only these tests catch: a sum over batches that ends before the other processes' batches (products, moments,
triangles, scales, diagonals), rows of a factor in another order than in one process, targets of the Monte Carlo Fisher
matrix that depend on who draws them, a process without data that has no shapes to contribute, statistics of layers that
run on one process only, a method or a null space that is chosen from one shard, results that differ between ranks; a
process that waits for one that has failed, died or stalled; processes that add up different models, losses, points or
vectors; a group that is out of step after an error that both caught; a saved run that each process resumes from a file
of its own; a check that one process passes and the other never reaches. One file, because starting two processes takes
longer than what they do, and what they found is shared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_jobs import found, start, trained
from shard_measurements import PROBLEMS, measured

from bnp_analysis.distributed import ALONE


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[int, str]], Path]:
    """A run whose second process is killed after 65 steps, and the folder in which it kept its state."""
    folder = tmp_path_factory.mktemp("two_processes")
    return start("killed", folder, KILL_AT="65"), folder


@pytest.fixture(scope="module")
def two(killed: tuple[list[tuple[int, str]], Path]) -> list[Any]:
    """What each of two processes found: the killed run resumed, measurements, errors, a run that nothing disturbed."""
    folder = killed[1]
    for status, output in start("measure", folder):
        assert status == 0, output
    return found("measure", folder)


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


#: What each process says: (type, words) of rank 0, of rank 1.
EXPECTED = {
    "nan": ("DistributedError", "rank 1: NonFiniteError: batch 0 has NaN", "NonFiniteError", "4 of 24 entries"),
    "parameters": ("DistributedError", "the point theta of the risk on rank 1", "DistributedError", "on rank 1"),
    "loss": ("DistributedError", "the loss of the risk on rank 1", "DistributedError", "label_smoothing"),
    "modes": ("DistributedError", "the train flags of the risk on rank 1", "DistributedError", "train flags"),
    "dtype": ("DistributedError", "the dtype and kind of device", "DistributedError", "torch.float32 on cpu against"),
    "random": ("DistributedError", "rank 1: StochasticModelError", "StochasticModelError", "random in training mode"),
    "coupled": ("StochasticModelError", "over 2 batches", "StochasticModelError", "over 2 batches"),
    "no data": ("InvalidInputError", "weigh 0.0 in total", "InvalidInputError", "weigh 0.0 in total"),
    "a part": ("DistributedError", "rank 1: KeyError: 'only here'", "KeyError", "only here"),
    "vectors": ("DistributedError", "they have different vectors", "DistributedError", "they have different vectors"),
    "places": (
        "DistributedError",
        "rank 1: a product with Hessian",
        "DistributedError",
        "rank 0: the rounding of the loss's curvature",  # which the first product asks for
    ),
    "points": ("DistributedError", "with the point: they have different", "DistributedError", "the point"),
}


def test_an_error_on_one_process_is_an_error_on_both_and_they_stay_in_step(two: list[Any]) -> None:
    first, second = (one["errors"] for one in two)
    assert first.keys() == second.keys() == {*EXPECTED, "afterwards"}
    for case, (kind, words, other_kind, other_words) in EXPECTED.items():
        assert first[case][0] == kind, (case, first[case])
        assert words in first[case][1], (case, first[case])
        assert second[case][0] == other_kind, (case, second[case])
        assert other_words in second[case][1], (case, second[case])
    assert first["afterwards"] == second["afterwards"]


def test_a_killed_process_ends_the_others(killed: Any) -> None:
    (survivor, words), (victim, _) = killed[0]
    assert victim == -9
    assert survivor == 1
    assert "DistributedError: rank 0 of 2 was left alone at 'a product with Hessian'" in words
    assert "no sign of rank 1" in words
    assert "Timed out" not in words, "a closed connection is noticed at once"


def test_a_killed_run_resumes_on_all_processes(two: list[Any]) -> None:
    calm = two[0]["undisturbed"]
    for one in (process["resumed"] for process in two):
        assert 50 <= one["began at"] < 65, "what rank 0 had saved"
        assert one["files"] == ["state.pt"], "rank 0 alone writes"
        assert all(torch.equal(one[name], calm[name]) for name in ("alpha", "beta", "basis"))


@pytest.mark.slow
def test_a_process_that_is_late_ends_all(tmp_path: Path) -> None:
    for status, output in start("late", tmp_path):
        assert status == 1
        assert "cannot go on" in output
    waiting, late = found("late", tmp_path)
    assert waiting["error"][0] == late["error"][0] == "DistributedError"
    assert "no sign of rank 1" in waiting["error"][1]
    assert "rank 0 or its launcher, who keep the list of processes, are gone" in late["error"][1]
    assert "cannot go on" in waiting["again"][1]
    assert "Timed out waiting 2000ms" in waiting["error"][1]
