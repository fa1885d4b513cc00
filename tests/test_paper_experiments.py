"""The paper's experiments: jobs that go on where they stopped, at the published rates, beside the published curves.

Bugs that only these tests catch: a resumed curve that is not that of one run; a run that goes on under other settings;
a rate that is not that of the paper's tables; a network of another size or start; BNP in the experiments that is not
`BNP.paper`; a spread that forgets a source of error; a page that is not what the curves say.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bnp_analysis.errors import InvalidInputError
from paper_figures import experiments, reproduction, training_panels
from paper_figures.experiments import Job, Panel

SMALL = Panel("dense", "digits", 20, 3, samples=100, hidden=(8, 8, 8))
BY_STEP = replace(SMALL, every=2)


def curve_of(out: Path, what: Job) -> dict[str, list[float]]:
    found = experiments.read(out / f"{what.name}.json", what)
    assert found is not None
    return dict(found["curve"])


@pytest.mark.parametrize("method", ["Vanilla", "BN", "BNP", "BN Renorm", "LN"])
@pytest.mark.parametrize("panel", [SMALL, BY_STEP])
def test_a_job_that_went_on_has_the_curve_of_one_run(method: str, panel: Panel, tmp_path: Path) -> None:
    what = Job("small", method, 1, 0.05, panel)
    for epochs in (1, 3):
        assert experiments.advance(what, epochs, tmp_path)
    sets = experiments.load(panel, "train"), experiments.load(panel, "test")
    whole = experiments.run(what, 3, *sets)
    assert curve_of(tmp_path, what) == experiments.curve(whole, every=panel.every, steps=5)
    assert curve_of(tmp_path, what)["x"] == ([2, 4, 6, 8, 10, 12, 14] if panel.every else [1, 2, 3])


def test_the_losses_of_a_curve_are_what_they_are_called(tmp_path: Path) -> None:
    what = Job("small", "Vanilla", 0, 0.05, BY_STEP)
    sets = experiments.load(BY_STEP, "train"), experiments.load(BY_STEP, "test")
    run = experiments.run(what, 2, *sets)
    found = experiments.curve(run, every=2, steps=5)
    assert found["train_loss"][2] == pytest.approx(run.loss[5:6].mean(), rel=1e-4)
    assert found["train_loss"][4] == pytest.approx(run.loss[5:10].mean(), rel=1e-4)
    assert found["train_loss_last"][2] == pytest.approx(run.loss[5], rel=1e-4)


def test_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    what = Job("small", "BNP", 0, 0.05, SMALL)
    experiments.advance(what, 1, tmp_path)
    for other in (replace(what, lr=0.1), replace(what, setting=replace(SMALL, batch=10))):
        with pytest.raises(InvalidInputError, match="holds another run"):
            experiments.advance(other, 2, tmp_path)
    monkeypatch.setattr(experiments, "queue", lambda out, only: iter([(replace(what, lr=0.1), 2)]))
    assert experiments.main(["run", str(tmp_path)]) == 2
    assert "lr: 0.05 there, 0.1 here" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.lock"))


def test_missing_data_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BNP_ANALYSIS_DATA", str(tmp_path))
    monkeypatch.setattr(experiments, "queue", lambda out, only: iter([(experiments.job("fig3_mnist_60", "BN", 0), 1)]))
    experiments._load.cache_clear()
    assert experiments.main(["run", str(tmp_path / "out")]) == 2
    assert "download=True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--only", "fig3", "fig33"], "no panel begins with fig33"),
        (["status"], "holds no runs"),
        (["collect"], "holds no runs"),
    ],
)
def test_what_is_not_there_is_named(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiments.main([words[0], str(tmp_path / "out"), *words[1:]]) == 2
    assert said in capsys.readouterr().err


def test_two_processes_do_not_share_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = Job("small", "Vanilla", 0, 0.05, SMALL)
    (tmp_path / f"{what.name}.lock").write_text("1")  # a process that is alive
    monkeypatch.setattr(experiments, "queue", lambda out, only: iter([(what, 1)]))
    assert experiments.main(["run", str(tmp_path)]) == 0
    assert experiments.read(tmp_path / f"{what.name}.json", what) is None


@pytest.mark.parametrize("panel", experiments.RATES)
def test_rates_are_those_of_the_tables(panel: str) -> None:
    published = json.loads(training_panels.PUBLISHED.read_text())
    setting = experiments.PANELS[panel]
    kind = {"mnist": "MNIST", "cifar10": "CIFAR10"}[setting.data]
    if setting.network == "dense":
        table, row = published["table_2"], f"mini-batch size {setting.batch} {kind}"
    else:
        table, row = published["table_3"], f"5-layer CNN batch size {setting.batch} {kind}"
    rates = dict(zip(table["columns"], table["rows"][row], strict=True))
    rates.pop("BN w/ 4 Things", None)
    assert experiments.RATES[panel] == {name: rate for name, rate in rates.items() if rate is not None}
    assert {*experiments.RATES[panel], "BN w/ 4 Things"} >= set(published["panels"][panel]["curves"])


@pytest.mark.parametrize(
    ("panel", "shape", "sizes"),
    [("fig3_mnist_60", (784,), [784, 100, 100, 100, 10]), ("fig5_cnn_2", (3, 32, 32), [3, 32, 64, 32, 64, 10])],
)
def test_networks_are_those_of_the_paper(panel: str, shape: tuple[int, ...], sizes: list[int]) -> None:
    model = experiments.network(experiments.job(panel, "BN", 0), shape)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert [layer.weight.shape[0] for layer in layers] == sizes[1:]
    for layer in layers:
        assert layer.bias is not None
        assert not layer.bias.any()
        area = layer.weight[0, 0].numel()
        bound = math.sqrt(6 / (area * (layer.weight.shape[0] + layer.weight.shape[1])))
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
    first = next(iter(model.children()))
    assert isinstance(first, nn.BatchNorm1d | nn.BatchNorm2d)
    assert sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules()) == len(layers)
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    for method, settings in (("BN", (0.01, 1e-3)), ("BN Renorm", (0.01, 1e-3))):
        what = replace(experiments.job(panel, "BN", 0), method=method)
        norms = [m for m in experiments.network(what, shape).modules() if hasattr(m, "running_mean")]
        assert [(norm.momentum, norm.eps) for norm in norms] == [settings] * len(layers)
        assert (what.settings()["momentum"], what.settings()["eps"]) == settings


def test_bnp_is_the_published_algorithm() -> None:
    said = experiments.job("fig5_cnn_2", "BNP", 0).settings()["BNP"]
    assert "rho=0.99, eps1=0.01, eps2=0.0001, q='paper', variance='paper', init='paper'" in said


def test_collected_curves_join_those_that_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "CURVES", tmp_path / "curves.json")

    def collected(*made: tuple[Job, int]) -> dict[str, dict[str, list[float]]]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        for what, epochs in made:
            experiments.advance(what, epochs, out)
        experiments.collect(out)
        there = json.loads(experiments.CURVES.read_text())["small"]
        return {m: {seed: run["x"] for seed, run in place["seeds"].items()} for m, place in there.items()}

    plain, bn = Job("small", "Vanilla", 0, 0.05, SMALL), Job("small", "BN", 0, 0.05, SMALL)
    assert collected((plain, 2), (bn, 1)) == {"Vanilla": {"0": [1, 2]}, "BN": {"0": [1]}}
    # Another machine's: a shorter run, another seed and a longer run.
    found = collected((plain, 1), (replace(plain, seed=1), 1), (bn, 2))
    assert found == {"Vanilla": {"0": [1, 2], "1": [1]}, "BN": {"0": [1, 2]}}
    assert collected((replace(plain, lr=0.1), 1)) == {"Vanilla": {"0": [1]}, "BN": {"0": [1, 2]}}


def test_rates_are_searched_outward_until_the_best_is_inside(tmp_path: Path) -> None:
    """Losses that fall until rate 1 and rise then: the search begins at 0.03."""
    asked = []
    for what in experiments.tuned("q_2", "rows", (0, 1, 2), tmp_path):
        asked.append((what.lr, what.seed))
        loss = abs(math.log10(what.lr))
        record = {"settings": what.settings(), "stopped": "finished", "curve": {"train_loss_eval": [loss]}}
        experiments.write(tmp_path / f"{what.name}.json", record)
    assert [rate for rate, seed in asked if seed == 0] == [0.03, 0.01, 0.1, 0.3, 1.0, 3.0]
    assert asked[-2:] == [(1.0, 1), (1.0, 2)]


def arrays(ours: list[list[float]], published: list[list[float]]) -> dict[str, object]:
    place = "fig3_cifar_60/BN"
    return {
        "panels": ["fig3_cifar_60"],
        "fig3_cifar_60/methods": ["BN"],
        "fig3_cifar_60/error": [0.001, 0.01],
        f"{place}/ours/x": [1, 2],
        f"{place}/ours/test_accuracy": ours,
        f"{place}/published/x": [1, 2, 3],
        f"{place}/published/test_accuracy": np.array(published),
    }


def test_the_spread_has_all_its_parts() -> None:
    given = arrays([[0.4, 0.5], [0.42, 0.5]], [[0.41, 0.6, 0.7], [0.40, math.nan, 0.6], [0.42326, math.nan, 0.8]])
    first, second = training_panels.compare(given, "fig3_cifar_60", "BN", "test_accuracy")
    pooled = (2 * 0.01**2 + 4 * 0.01**2) / 5
    assert first.spread == pytest.approx(math.sqrt(pooled * (1 / 2 + 1 / 5) + 1e-6), rel=1e-3)
    assert (first.x, first.seeds, first.agrees) == (1, 2, True)
    assert second.difference == pytest.approx(-0.1)
    typical = np.median([0.02326, 0.2]) / 2.326
    assert second.spread == pytest.approx(math.sqrt(4 * typical**2 / 5 * (1 / 2 + 1 / 5) + 1e-6), rel=1e-3)


def test_a_verdict_says_how_far_and_how_long() -> None:
    good = [[0.41, 0.6, 0.7], [0.40, 0.59, 0.69], [0.42, 0.61, 0.71]]
    assert reproduction.verdict(arrays([[0.4, 0.601]], good), "fig3_cifar_60", "BN") == "agrees (after 2 of 20)"
    said = reproduction.verdict(arrays([[0.4, 0.5]], good), "fig3_cifar_60", "BN")
    assert said == "differs by -10.00 points (after 2 of 20)"
    assert reproduction.verdict(arrays([[0.4, 0.5]], good), "fig3_cifar_60", "LN") == "not run"
    assert reproduction.verdict(arrays([[0.4, math.nan]], good), "fig3_cifar_60", "BN").startswith("agrees (after 1 ")


@pytest.mark.skipif(not reproduction.PAGE.exists(), reason="the page was not written yet")
def test_the_page_is_what_the_curves_say() -> None:
    assert reproduction.page() == reproduction.PAGE.read_text()


def test_without_padding_the_network_is_the_narrower_one() -> None:
    model = experiments.network(experiments.job("valid_cnn_128", "Vanilla", 0), (3, 32, 32))
    assert model.get_submodule("fc4").in_features == 32 * 4 * 4
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert experiments.job("valid_cnn_128", "BNP", 0).settings()["padding"] == "valid"
