"""The comparison runner: a method that is not at its own best rate, a choice that looks at the test set, runs that are
repeated or lost when a comparison is stopped, processes whose results differ from those of one, and statistics over the
wrong runs are caught here."""

from __future__ import annotations

import json
import math
import pickle
import signal
import statistics
from dataclasses import replace

import pytest

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.experiment import Experiment, run_experiment, split
from paper_figures import comparison
from paper_figures.comparison import MethodComparison, Store, compare_methods, key_of, run_record
from paper_figures.cost import measure_cost

BASE = Experiment(samples=120, hidden=(8,), epochs=2, batch_size=20)
METHODS = {"vanilla": {}, "BNP+GN": {"preconditioner": "bnp", "norm": "group"}}
CALL = {"rates": [0.01, 0.3, 1e30], "seeds": [0, 1, 2], "search_epochs": 1, "cost": False}


def test_each_method_is_searched_on_held_out_examples_and_run_at_its_own_best_rate():
    found = compare_methods(BASE, METHODS, **CALL)
    for row, (name, change) in zip(found.rows, METHODS.items(), strict=True):
        search = [row for row in found.search if row["method"] == name]
        assert [row["stopped"] for row in search] == ["finished", "finished", "diverged"]
        short = replace(BASE, **change, lr=0.3, epochs=1, holdout=1 / 6)
        assert search[1]["accuracy"] == run_experiment(short).final["accuracy"]
        best = max(search[:2], key=lambda row: row["accuracy"])
        assert row["lr"] == best["lr"]
        assert row["lr_at_edge"] == (best["lr"] == 0.01)
        runs = [run_experiment(replace(BASE, **change, lr=best["lr"], seed=seed)) for seed in (0, 1, 2)]
        values = [run.final["accuracy"] for run in runs]
        assert row["seeds"] == 3
        assert row["accuracy"] == pytest.approx(statistics.fmean(values))
        assert row["accuracy_std"] == pytest.approx(statistics.stdev(values))
        assert (row["accuracy_min"], row["accuracy_max"]) == (min(values), max(values))
        assert row["train_loss"] == pytest.approx(statistics.fmean([run.final["train_loss"] for run in runs]))
        curve = [row for row in found.curves if row["method"] == name]
        assert [(row["seed"], row["epoch"]) for row in curve] == [(s, e) for s in (0, 1, 2) for e in (1, 2)]
        assert curve[1]["accuracy"] == values[0]


def test_held_out_examples_are_training_examples_that_do_not_train():
    (x, y), (held_x, held_y) = split(replace(BASE, holdout=0.25))
    (whole, _), (test, _) = split(BASE)
    rows = {tuple(row) for row in whole.tolist()}
    assert (len(x), len(held_x), len(y), len(held_y)) == (90, 30, 90, 30)
    assert {tuple(row) for row in x.tolist()} | {tuple(row) for row in held_x.tolist()} == rows
    assert len(test) == 360


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    calls = []

    def counted(experiment, data_dir=None):
        calls.append(key_of(experiment))
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return run_record(experiment, data_dir)

    whole = compare_methods(BASE, METHODS, **CALL)
    monkeypatch.setattr(comparison, "run_record", counted)
    path = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare_methods(BASE, METHODS, results=path, **CALL)
    assert len(path.read_text().splitlines()) == 3
    path.write_bytes(path.read_bytes() + b'{"key": "cut')
    found = compare_methods(BASE, METHODS, results=path, **CALL)
    assert len(path.read_text().splitlines()) == 12
    assert len(calls) == 13, "12 runs, one of them twice"
    seen = []
    again = compare_methods(
        BASE, METHODS, results=path, progress=lambda done, total: seen.append((done, total)), **CALL
    )
    assert len(calls) == 13
    assert seen[-1] == (12, 12)
    assert without_times(found) == without_times(whole) == without_times(again)
    assert MethodComparison.load(found.save(tmp_path / "c.json")) == found


def without_times(found: MethodComparison) -> str:
    def strip(rows):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    return json.dumps([strip(found.rows), strip(found.search), strip(found.curves)])


def test_what_goes_to_a_process_and_back_survives_the_way():
    experiment = replace(BASE, preconditioner="bnp", bnp={"rho": 0.9}, epochs=1)
    function, sent = pickle.loads(pickle.dumps((run_record, experiment)))
    found = pickle.loads(pickle.dumps(function(sent)))
    assert found["epochs"][0]["accuracy"] == run_record(experiment)["epochs"][0]["accuracy"]
    assert key_of(sent) == key_of(experiment)


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path):
    call = CALL | {"rates": [0.1], "seeds": [0]}
    one = compare_methods(BASE, METHODS, **call)
    two = compare_methods(BASE, METHODS, workers=2, results=tmp_path / "runs.jsonl", **call)
    assert without_times(one) == without_times(two)
    assert math.isnan(one.rows[0]["accuracy_std"])


def test_what_cannot_run_is_said_in_its_row():
    base = replace(BASE, batch_size=1, epochs=1)
    methods = {"BN": {"norm": "batch"}, "wild": {"lr": 1.0, "activation": "identity"}}
    found = compare_methods(base, methods, rates=[1e30], seeds=[0], cost=False)
    assert [row["lr"] for row in found.rows] == [None, None]
    assert "more than one value per channel" in found.rows[0]["note"]
    assert found.rows[1]["note"] == "diverged at every learning rate"
    assert str(found) == "accuracy: "


@pytest.mark.slow
def test_time_and_memory_of_a_step_grow_with_the_network():
    large = replace(BASE, hidden=(1500, 1500))
    refused = replace(BASE, norm="batch", batch_size=1)
    small, big, none = measure_cost([BASE, large, refused], (64,), 10, rounds=3, steps=3, memory=True)
    assert big["step_ms"] > 2 * small["step_ms"] > 0
    assert big["peak_mb"] > 2 * 1500 * 1500 * 4 / 2**20 > small["peak_mb"] >= 0
    assert none == {}


def test_the_cost_of_a_step_stands_in_the_table_beside_the_first_method(monkeypatch):
    monkeypatch.setattr(comparison, "measure_cost", lambda experiments, *_, **__: [{"step_ms": 2.0}, {"step_ms": 3.0}])
    found = compare_methods(BASE, METHODS, **CALL | {"cost": True, "rates": [0.1], "seeds": [0]})
    assert [row["step_ratio"] for row in found.rows] == [1.0, 1.5]


def test_keys_know_every_setting_and_bad_input_is_refused(tmp_path):
    keys = {key_of(e) for e in (BASE, replace(BASE, seed=1), replace(BASE, holdout=0.5), replace(BASE, lr=0.2))}
    assert len(keys) == 4
    for change, message in (({"rates": []}, "at least one"), ({"holdout": 0.0}, "holdout"), ({"workers": 0}, "worker")):
        with pytest.raises(InvalidInputError, match=message):
            compare_methods(BASE, METHODS, **CALL | change)
    with pytest.raises(InvalidInputError, match="no_such"):
        compare_methods(BASE, {"a": {"no_such": 1}}, **CALL)
    (tmp_path / "bad.jsonl").write_text('{"key": "a"}\nnonsense\n')
    with pytest.raises(InvalidInputError, match="line 2"):
        Store(tmp_path / "bad.jsonl")
