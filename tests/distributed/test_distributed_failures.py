"""What goes wrong in one process ends all of them, in bounded time, with words that say where to look.

Bugs that only these tests catch: a process that waits for one that has failed, died or stalled; processes that add up
different models, losses, points or vectors; a group that is out of step after an error that both caught; a saved run
that each process resumes from a file of its own; a check that one process passes and the other never reaches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_jobs import found, start

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
