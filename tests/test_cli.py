"""The command line: a wrong exit status, an option that is read under another name, or output that does not carry
what was measured is caught here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.cli import main

SMALL = ["--samples", "60", "--hidden", "6", "--epochs", "1", "--quiet"]


def test_condition_prints_table_bounds_and_writes_files(tmp_path, capsys):
    out, picture = tmp_path / "c.json", tmp_path / "c.png"
    assert main(["condition", *SMALL, "--json", str(out), "--figure", str(picture)]) == 0
    text = capsys.readouterr().out
    for word in ("fc1", "fc2", "k(G^)", "Whole network", "gauss-newton", "hessian", "negative", "products"):
        assert word in text
    assert "the Hessian's here" in text
    result = bnp.Comparison.load(out)
    assert [row.layer for row in result.layers.layers] == ["fc1", "fc2"]
    assert picture.stat().st_size > 1000
    json.loads(out.read_text())


def test_the_seed_decides_and_options_reach_their_place(tmp_path):
    found = []
    for seed in ("0", "0", "1"):
        out = tmp_path / "c.json"
        args = ["condition", *SMALL, "--seed", seed, "--curvature", "fisher-mc", "--layers", "fc2", "--json", str(out)]
        assert main(args) == 0
        found.append(bnp.Comparison.load(out))
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert list(found[0].network) == ["fisher-mc"]
    assert [row.layer for row in found[0].layers.layers] == ["fc2"]


def test_damping_dtype_and_other_models(tmp_path):
    out = tmp_path / "c.json"
    options = ["--preconditioner", "bnp-damped", "--dtype", "float32", "--curvature", "gauss-newton"]
    assert main(["condition", *SMALL, *options, "--json", str(out)]) == 0
    result = bnp.Comparison.load(out)
    assert result.network["gauss-newton"][0].dtype == "float32"
    assert result.layers.settings["preconditioner"]["eps1"] == 1e-2


@pytest.mark.parametrize("name", ["diagonal", "kfac"])
def test_other_preconditioners(name, tmp_path):
    out = tmp_path / "c.json"
    args = ["condition", *SMALL, "--preconditioner", name, "--curvature", "gauss-newton", "--json", str(out)]
    assert main(args) == 0
    units = bnp.Comparison.load(out).layers.layers[0].unit_blocks_with_P
    assert all(k is None for k in units) == (name == "kfac")


def test_spectrum_writes_both_densities(tmp_path, capsys):
    args = ["spectrum", *SMALL, "--top", "2", "--probes", "2", "--steps", "8"]
    assert main([*args, "--json", str(tmp_path / "s.json"), "--figure", str(tmp_path / "s.png")]) == 0
    assert "with P" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "s-density-with-P.json", "s-density.json", "s-eigenpairs-with-P.json", "s-eigenpairs.json", "s.png",
    ]  # fmt: skip
    pairs = bnp.Eigenpairs.load(tmp_path / "s-eigenpairs.json")
    assert pairs.values[0] >= pairs.values[1]


def test_a_checkpoint_is_measured_where_it_stands(tmp_path, capsys):
    model = bnp.models.mlp([64, 6, 10], seed=5)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    small = [word for word in SMALL if word not in ("--epochs", "1")]
    out = tmp_path / "c.json"
    assert main(["condition", *small, "--checkpoint", str(tmp_path / "m.pt"), "--json", str(out)]) == 0
    assert "not trained" in capsys.readouterr().out
    data = bnp.data.load("digits", n=60)
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, data.tensors, dtype=torch.float64)
    expected = bnp.condition_number(bnp.gauss_newton(risk, block="fc2"))
    assert bnp.Comparison.load(out).layers.layers[1].block.value == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "mnist", "--data-dir", "nowhere"], "mnist"),
        (["--layers", "fc7"], "fc1, fc2"),
        (["--samples", "100000"], "100000"),
        (["--checkpoint", "missing.pt"], "missing.pt"),
        (["--lr", "1e30", "--epochs", "2"], "learning rate"),
    ],
)
def test_bad_input_says_so_and_exits_with_two(options, words, capsys):
    assert main(["condition", "--samples", "60", "--hidden", "6", "--epochs", "1", "--quiet", *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, capsys):
    torch.save(bnp.models.mlp([64, 7, 10]).state_dict(), tmp_path / "m.pt")
    assert main(["condition", *SMALL, "--checkpoint", str(tmp_path / "m.pt")]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_module_and_help():
    done = subprocess.run(
        [sys.executable, "-m", "bnp_analysis", "condition", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--curvature" in done.stdout
    assert subprocess.run([sys.executable, "-m", "bnp_analysis"], capture_output=True, check=False).returncode == 2
