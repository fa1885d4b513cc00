"""Figures: data from a computation or from a file, a verdict that can fail, a picture from the data alone.

Bugs that only this file catches: a figure without provenance, data computed again although nothing changed or kept
although something did, a claim that no data can refute, a drawing that computes, a committed figure whose claim fails
without saying so.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

from paper_figures import __main__ as runner
from paper_figures import frame

FULL = frame.HERE / "full"
CHEAP = "fig06_largest_singular_value"
KEPT = [name for name in frame.names() if frame.stored(name, FULL) is not None]


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the figure that is computed."""
    few = frame.module(CHEAP).PRESETS["quick"] | {"rows": [4, 64, 256], "draws": 3}
    monkeypatch.setitem(frame.module(CHEAP).PRESETS, "quick", few)


@pytest.fixture
def _blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at no picture."""
    monkeypatch.setattr(frame.module(CHEAP), "draw", lambda data: plt.figure())


def ignore(fraction: float) -> None:
    """Nobody looks."""


@pytest.mark.parametrize("name", frame.names())
def test_a_figure_keeps_the_contract(name: str) -> None:
    module = frame.module(name)
    assert set(module.PRESETS) == set(frame.PRESETS)
    assert module.TITLE
    assert module.CLAIM.endswith(".")
    assert module.SHOWS.startswith("T")
    for preset in frame.PRESETS:
        assert json.loads(json.dumps(module.PRESETS[preset])) == module.PRESETS[preset]


def test_a_run_leaves_data_provenance_pictures_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [CHEAP, "--out", str(tmp_path)]
    assert runner.main(arguments) == 0
    assert "computed" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.glob(f"{CHEAP}.*")} == {".npz", ".json", ".png", ".pdf"}
    about = json.loads((tmp_path / f"{CHEAP}.json").read_text())
    assert {"settings", "seed", "versions", "revision", "command", "seconds", "preset", "key"} <= set(about)
    page = (tmp_path / "index.md").read_text()
    assert frame.module(CHEAP).TITLE in page
    assert about["command"] in page
    before = (tmp_path / f"{CHEAP}.npz").read_bytes()
    assert runner.main(arguments) == 0
    assert "data kept" in capsys.readouterr().out
    assert runner.main([*arguments, "--force"]) == 0
    assert "computed" in capsys.readouterr().out
    again, first = frame.stored(CHEAP, tmp_path), tmp_path / "first.npz"
    first.write_bytes(before)
    assert again is not None
    with np.load(first) as arrays:
        assert all(np.array_equal(arrays[word], again[word]) for word in arrays.files)


def test_changed_settings_are_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, computed = frame.make(CHEAP, "quick", tmp_path, ignore)
    assert computed
    changed = frame.module(CHEAP).PRESETS["quick"] | {"draws": 2}
    monkeypatch.setitem(frame.module(CHEAP).PRESETS, "quick", changed)
    data, computed = frame.make(CHEAP, "quick", tmp_path, ignore)
    assert computed
    assert data["observed"].shape[-1] == 2


@pytest.mark.usefixtures("_blank")
def test_an_interrupted_run_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = "fig10_shift_and_scale"

    def stop(settings: Any, report: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(frame.module(later), "compute", stop)
    assert runner.main([CHEAP, later, "--out", str(tmp_path)]) == runner.INTERRUPTED
    assert frame.stored(CHEAP, tmp_path) is not None
    assert frame.stored(later, tmp_path) is None
    assert CHEAP in (tmp_path / "index.md").read_text()


def test_what_a_computation_keeps_to_go_on_is_bound_to_the_code_and_goes_with_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = frame.module(CHEAP).PRESETS["quick"]
    folder = frame.scratch(CHEAP, settings)
    (folder / "state").write_text("half done")
    assert frame.scratch(CHEAP, settings) == folder
    assert frame.scratch(CHEAP, {**settings, "seed": -1}) != folder
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("# another version of the code\n")
    with monkeypatch.context() as other:
        other.setattr(frame.bnp_analysis, "__file__", str(package / "__init__.py"))
        assert frame.scratch(CHEAP, settings) != folder
    frame.make(CHEAP, "quick", tmp_path / "out", ignore)
    assert not folder.exists()


@pytest.mark.usefixtures("_blank")
@pytest.mark.parametrize("timed", [False, True])
def test_only_claims_that_are_not_about_times_decide_the_exit_status(
    timed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frame.module(CHEAP), "failure", lambda data: "it is not so")
    monkeypatch.setattr(frame.module(CHEAP), "TIMED", timed, raising=False)
    assert runner.main([CHEAP, "--out", str(tmp_path)]) == (0 if timed else 1)
    assert ("1 with times" in capsys.readouterr().out) is timed
    assert "it is not so" in (tmp_path / "index.md").read_text()


def test_the_figures_that_measure_times_say_so() -> None:
    clocks = ("perf_counter", "process_time", "measure_cost")
    reading = {n for n in frame.names() if any(c in (frame.HERE / "figures" / f"{n}.py").read_text() for c in clocks)}
    assert reading == {name for name in frame.names() if runner.is_timed(name)}


def test_an_unknown_figure_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["fig99", "--out", str(tmp_path)]) == 2
    assert CHEAP in capsys.readouterr().err


@pytest.mark.parametrize("taken", [f"{CHEAP}.pdf", f"{CHEAP}.npz", "index.md"])
def test_files_are_tried_before_a_figure_is_computed(
    taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / taken).mkdir()
    monkeypatch.setattr(frame.module(CHEAP), "compute", lambda settings, report: pytest.fail("computed"))
    assert runner.main([CHEAP, "--out", str(tmp_path)]) == 2
    said = f"--out={str(tmp_path / taken)!r} is a folder; give the path of a file"
    assert capsys.readouterr().err == f"bnp-analysis figures: error: {said}\n"
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def spoiled(data: frame.FigureData, change: Any) -> frame.FigureData:
    """The data with every array of floats changed."""
    with np.errstate(all="ignore"):
        arrays = {
            word: change(values) if values.dtype.kind == "f" and values.size else values
            for word, values in data.arrays.items()
        }
    return dataclasses.replace(data, arrays=arrays)


@pytest.mark.parametrize("name", KEPT)
def test_a_claim_can_fail(name: str) -> None:
    """Numbers turned around, and numbers lost: neither may pass for a claim that holds."""
    data = frame.stored(name, FULL)
    assert data is not None
    module = frame.module(name)
    rng = np.random.default_rng(0)
    assert module.failure(spoiled(data, lambda values: np.full_like(values, np.nan)))
    assert any(
        module.failure(spoiled(data, change))
        for change in (np.reciprocal, np.flip, lambda values: values * rng.lognormal(sigma=9, size=values.shape))
    )


@pytest.mark.parametrize("name", KEPT)
def test_a_committed_figure_is_drawn_from_its_data_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = frame.stored(name, FULL)
    assert data is not None
    assert data.about["figure"] == name
    module = frame.module(name)
    recorded = [frame.ROOT / path for path in module.PRESETS["full"].get("inputs", [])]
    if not all(path.exists() for path in recorded):
        pytest.skip("the recorded results that it draws are in the repository alone")
    assert data.about["key"] == frame.key(name, "full"), "its code or settings changed: make it again"
    monkeypatch.delattr(module, "compute")
    figure = module.draw(data)
    assert figure.axes
    plt.close(figure)
    page = (FULL / "index.md").read_text()
    assert module.TITLE in page
    assert module.failure(data) in page


@pytest.mark.parametrize("number", [3, 4, 6])
def test_the_claims_of_the_theory_hold_on_the_committed_data(number: int) -> None:
    names = [name for name in KEPT if name.startswith(f"fig{number:02d}")]
    assert names
    for name in names:
        data = frame.stored(name, FULL)
        assert data is not None
        assert frame.module(name).failure(data) == ""
