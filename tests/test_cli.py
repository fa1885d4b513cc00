"""The command line: a wrong exit status, an option that is read under another name, or output that does not carry
what was measured is caught here."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.cli import answered, main, parser_of
from bnp_analysis.cli.options import risk_of
from bnp_analysis.curvature import CURVATURES
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.theory.statements import layers as coordinates

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--samples", "40", "--hidden", "4", "--epochs", "1", "--quiet"]


def test_help_loads_neither_torch_nor_matplotlib():
    program = (
        "import sys; from bnp_analysis.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert all(name in run.stdout for name in ("condition", "spectrum", "train", "check", "figures", "bench"))


def test_condition_prints_table_bounds_and_writes_files(tmp_path, capsys):
    out, picture = tmp_path / "c.json", tmp_path / "c.png"
    assert main(["condition", *SMALL, "--json", str(out), "--figure", str(picture)]) == 0
    text = capsys.readouterr().out
    for word in ("fc1", "fc2", "k(G^)", "Whole network", "gauss_newton", "hessian", "negative", "products", "R: rows"):
        assert word in text
    # It ends with what holds at any size: the ratios of the whole network from both sides, and the gain.
    for word in ("Hessian of the whole network", "dead: ", "gap: ", "without P over with P"):
        assert word in text
    assert re.search(r"\n +2 +\d\S* \(\S+ \.\. \S+\) +\d\S* \(\S+ \.\. \S+\) +\d\S* \(", text)
    assert "the Hessian's here" in text
    result = bnp.diagnose.Comparison.load(out)
    assert [row.layer for row in result.layers.layers] == ["fc1", "fc2"]
    assert picture.stat().st_size > 1000
    json.loads(out.read_text())


def test_the_seed_decides_and_options_reach_their_place(tmp_path):
    found = []
    for seed in ("0", "0", "1"):
        out = tmp_path / "c.json"
        args = ["condition", *SMALL, "--seed", seed, "--curvature", "fisher-mc", "--layers", "fc2", "--json", str(out)]
        assert main(args) == 0
        found.append(bnp.diagnose.Comparison.load(out))
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert list(found[0].network) == ["fisher_mc"]
    assert [row.layer for row in found[0].layers.layers] == ["fc2"]


def test_damping_dtype_and_other_models(tmp_path, capsys):
    out = tmp_path / "c.json"
    options = ["--preconditioner", "bnp-damped", "--dtype", "float32", "--curvature", "gauss_newton", "--layers", "fc2"]
    assert main(["condition", *SMALL, *options, "--norm", "layer", "--json", str(out)]) == 0
    assert "\nNot covered by P: norm1.weight (covered where it is asked for, also=[" in capsys.readouterr().out
    result = bnp.diagnose.Comparison.load(out)
    assert result.network["gauss_newton"][0].dtype == "float32"
    assert result.layers.settings["preconditioner"]["eps1"] == 1e-2


@pytest.mark.parametrize("name", ["diagonal", "kfac"])
def test_other_preconditioners(name, tmp_path):
    out = tmp_path / "c.json"
    args = ["condition", *SMALL, "--preconditioner", name, "--curvature", "gauss_newton", "--layers", "fc2"]
    assert main([*args, "--json", str(out)]) == 0
    units = bnp.diagnose.Comparison.load(out).layers.layers[0].unit_blocks_with_P
    assert all(k is None for k in units) == (name == "kfac")


def test_spectrum_by_engine_and_within_memory(capsys):
    args = ["spectrum", *SMALL, "--top", "1", "--probes", "1", "--steps", "4"]
    printed = []
    for more in (["--engine", "retained"], ["--engine", "recompute", "--max-memory", "100"]):
        assert main([*args, *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert main([*args, "--max-memory", "0.001"]) == 2
    assert "max_memory" in capsys.readouterr().err


def test_condition_by_engine_and_within_memory(tmp_path, capsys):
    out = tmp_path / "c.json"
    args = ["condition", *SMALL, "--curvature", "hessian", "--layers", "fc2", "--json", str(out)]
    assert main([*args, "--engine", "recompute", "--max-memory", "100"]) == 0
    plan = bnp.diagnose.Comparison.load(out).network["hessian"][0].engine
    assert (plan["engine"], plan["limit"]) == ("recompute", 100 * 2**20)
    for option, value, word in (("--max-memory", "0.001", "max_memory"), ("--max-flops", "1000", "max_flops")):
        assert main([*args, option, value]) == 2
        assert word in capsys.readouterr().err


def test_spectrum_writes_both_densities(tmp_path, capsys):
    args = ["spectrum", *SMALL, "--top", "2", "--probes", "2", "--steps", "8", "--no-reorthogonalization"]
    assert main([*args, "--json", str(tmp_path / "s.json"), "--figure", str(tmp_path / "s.png")]) == 0
    assert "with P" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "s-density-with-P.json", "s-density.json", "s-eigenpairs-with-P.json", "s-eigenpairs.json", "s.png",
    ]  # fmt: skip
    pairs = bnp.linalg.Eigenpairs.load(tmp_path / "s-eigenpairs.json")
    assert pairs.values[0] >= pairs.values[1]
    assert not bnp.linalg.SpectralDensity.load(tmp_path / "s-density.json").settings["reorthogonalize"]


def test_a_checkpoint_is_measured_where_it_stands(tmp_path, capsys):
    model = bnp.models.mlp([64, 4, 10], seed=5)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    small = [word for word in SMALL if word not in ("--epochs", "1")]
    out = tmp_path / "c.json"
    args = [
        "--curvature",
        "gauss_newton",
        "--layers",
        "fc2",
        "--checkpoint",
        str(tmp_path / "m.pt"),
        "--json",
        str(out),
    ]
    assert main(["condition", *small, *args]) == 0
    assert "not trained" in capsys.readouterr().out
    data = bnp.data.load("digits", n=40)
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, data.tensors, dtype=torch.float64)
    expected = bnp.condition_number(bnp.gauss_newton(risk, block="fc2"))
    assert bnp.diagnose.Comparison.load(out).layers.layers[0].block.value == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "mnist", "--data-dir", "nowhere"], "mnist"),
        (["--layers", "fc7"], "fc1, fc2"),
        (["--samples", "100000"], "100000"),
        (["--checkpoint", "missing.pt"], "missing.pt"),
        (["--lr", "1e30", "--epochs", "2"], "learning rate"),
        (["--hidden", "4", "0"], "--hidden must be at least 1"),
        (["--samples", "0"], "samples must be positive, got samples=0"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--checkpoint", "."], "the checkpoint . is a folder, a pipe or a device, not a file"),
        (["--figure", "table.txt"], "--figure table.txt: the suffix must be one of .png, .pdf"),
    ],
)
def test_bad_input_says_so_and_exits_with_two(options, words, capsys):
    assert main(["condition", *SMALL, *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--blocks", "fc9"], "--blocks: block: no parameter belongs to 'fc9'"),
        (["--blocks", "fc1", "--probes", "1"], "--probes 1: the noise of a distance needs at least two"),
    ],
)
def test_bad_blocks_of_a_spectrum_say_so_and_exit_with_two(options, words, capsys):
    assert main(["spectrum", *SMALL, *options]) == 2
    assert words in capsys.readouterr().err


def test_several_processes_do_not_fetch_the_same_files():
    arguments = parser_of("condition").parse_args(["--download"])
    arguments.group = argparse.Namespace(rank=0, size=2)
    with pytest.raises(InvalidInputError, match="--download in several processes would fetch the same files several"):
        risk_of(arguments)


def test_an_interrupted_program_says_so_and_exits_with_130(capsys):
    def stop() -> int:
        raise KeyboardInterrupt

    assert answered(stop, "some-program") == 130
    assert capsys.readouterr().err == "some-program: interrupted\n"


@pytest.mark.parametrize("during", ["eigenpairs", "density"])
def test_an_interrupted_spectrum_writes_what_there_is_and_exits_with_130(during, tmp_path, monkeypatch, capsys):
    """Its matrix has the eigenvalues 1 .. n, and is interrupted once."""
    products = 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        if products == interrupt:
            raise KeyboardInterrupt
        return v * torch.arange(1, len(v) + 1)

    def curvature(risk: bnp.EmpiricalRisk, seed: int, **engine: object) -> bnp.linalg.SymmetricOperator:
        return bnp.CallableOperator(product, risk.space.dim, dtype=torch.float64)

    monkeypatch.setitem(CURVATURES, "hessian", curvature)
    args = ["spectrum", *SMALL, "--top", "1", "--probes", "3", "--steps", "4", "--json", str(tmp_path / "s.json")]

    def written() -> tuple[bnp.linalg.Eigenpairs, bnp.linalg.SpectralDensity]:
        files = tmp_path / "s-eigenpairs.json", tmp_path / "s-density.json"
        return bnp.linalg.Eigenpairs.load(files[0]), bnp.linalg.SpectralDensity.load(files[1])

    interrupt = 0
    assert main(args) == 0
    pairs, density = written()
    for path in tmp_path.iterdir():
        path.unlink()
    interrupt = products + (pairs.matvecs - 1 if during == "eigenpairs" else pairs.matvecs + density.matvecs)
    capsys.readouterr()
    assert main(args) == 130
    captured = capsys.readouterr()
    assert captured.err == "bnp-analysis: interrupted\n"
    assert "hessian with P" not in captured.out
    assert {path.name for path in tmp_path.iterdir()} == {"s-eigenpairs.json", "s-density.json"}
    cut, rest = written()
    assert (cut.stop, len(rest.nodes)) == (("interrupted", 3) if during == "eigenpairs" else (pairs.stop, 2))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, capsys):
    torch.save(bnp.models.mlp([64, 7, 10]).state_dict(), tmp_path / "m.pt")
    assert main(["condition", *SMALL, "--checkpoint", str(tmp_path / "m.pt")]) == 2
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["condition", "train"])
@pytest.mark.parametrize("held", ["words", "nothing", "half", "module", "list", "other tensors"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence_of_ours(command, held, tmp_path, capsys):
    """torch's own words take several lines, and advise to run whatever code the file holds."""
    path, tensors = tmp_path / "m.pt", {"fc1.weight": torch.ones(2, 2)}
    torch.save({"module": {"m": torch.nn.Linear(2, 2)}, "list": [1, 2]}.get(held, tensors), path)
    cut = {"words": b"no archive\n", "nothing": b"", "half": path.read_bytes()[: path.stat().st_size // 2]}
    path.write_bytes(cut.get(held, path.read_bytes()))
    before = path.read_bytes()
    assert main([command, *SMALL, "--checkpoint", str(path), *(["--resume"] if command == "train" else [])]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("bnp-analysis: error: ")
    assert "m.pt" in sentence
    assert not re.search("weights_only|torch.load|iterable|subscriptable", sentence)
    assert path.read_bytes() == before


def test_module_and_help(capsys):
    assert subprocess.run([sys.executable, "-m", "bnp_analysis"], capture_output=True, check=False).returncode == 2
    with pytest.raises(SystemExit, match="0"):
        main(["condition", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "number of training examples (default: 1000)" in said
    assert "no progress bars --" in said, "what is no value is no default"


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="benchmarks/ is in the repository alone")
def test_figures_and_benchmarks_need_a_checkout_and_know_what_is_in_it(tmp_path, capfd, monkeypatch):
    root = str(ROOT)
    assert main(["bench", "nothing", "--root", root]) == 2
    assert "bnp_step" in capfd.readouterr().err
    assert main(["bench", "--list", "--root", root]) == 0
    listed = {line.split()[0] for line in capfd.readouterr().out.splitlines()}
    assert {"products", "krylov", "truth_suite", "bnp_step"} <= listed
    assert "truth_report" not in listed, "a part of the suite is no benchmark"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("figures", "bench"):
        assert main([command]) == 2
        assert "needs a checkout" in capfd.readouterr().err
        assert main([command, "--help"]) == 0


def test_figures_run_the_module_of_the_checkout(tmp_path, capfd):
    """In a checkout whose figures print what they were given; `test_figures` runs those of this one."""
    folder = tmp_path / "paper_figures"
    folder.mkdir()
    for name in ("README.md", "__init__.py"):
        (folder / name).touch()
    (folder / "__main__.py").write_text("import os, sys\nprint(os.getcwd(), *sys.argv[1:])\nsys.exit(2)\n")
    assert main(["figures", "fig99", "--root", str(tmp_path), "--out", "x"]) == 2
    assert capfd.readouterr().out.split() == [str(tmp_path), "fig99", "--out", "x"]


def test_figures_of_an_installation_run_in_the_current_folder(tmp_path, capfd, monkeypatch):
    """Outside of a checkout, with figures beside the package that print what they were given."""
    folder, here = tmp_path / "installed" / "paper_figures", tmp_path / "here"
    folder.mkdir(parents=True)
    here.mkdir()
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text("import os, sys\nprint(os.getcwd(), *sys.argv[1:])\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    monkeypatch.chdir(here)
    assert main(["figures", "fig99", "--out", "x"]) == 3
    assert capfd.readouterr().out.split() == [str(here), "fig99", "--out", "x"]


def test_bench_runs_what_is_named_or_a_choice(tmp_path, capfd):
    """In a checkout of scripts that print what they were given."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "README.md").touch()
    for name, status in {"products": 0, "krylov": 3, "truth_suite": 1, "other": 0}.items():
        known = '["--gpu"]' if name != "truth_suite" else "[]"
        text = f'"""What {name} does."""\nimport sys\nif __name__ == "__main__":\n    {known}\n'
        (folder / f"{name}.py").write_text(text + f"    print('ran {name}', *sys.argv[1:])\n    sys.exit({status})\n")

    def ran(*words: str) -> tuple[int, list[str]]:
        status = main(["bench", *words, "--root", str(tmp_path)])
        return status, [line[4:] for line in capfd.readouterr().out.splitlines() if line.startswith("ran ")]

    assert ran() == (3, ["products", "krylov", "truth_suite --quick"])
    assert ran("--quick") == (3, ["products --quick", "krylov --quick", "truth_suite --quick"])
    assert ran("--rounds", "1", "--threads", "1")[1][0] == "products --rounds 1 --threads 1"
    assert ran("--gpu") == (3, ["products --gpu", "krylov --gpu"])
    assert ran("truth", "--only", "x") == (1, ["truth_suite --only x"])
    assert ran("other", "products", "--quick") == (0, ["other --quick", "products --quick"])


def test_check_prints_a_line_per_check_and_says_the_verdict(tmp_path, capsys):
    out = tmp_path / "c.json"
    assert main(["check", *SMALL, "--only", "T3", "T7", "T6", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    table = bnp.theory.CheckTable.load(out)
    found = {check.source for check in table.checks}
    assert found == {"Algorithm 2 (T3)", "Prop. 10 (T6)", "T6", "Theorem 4 (T7)", "Prop. 11 (T7)", "T7"}
    assert [line for line in text.splitlines() if line.startswith(tuple(found))] == [str(c) for c in table.checks]
    assert str(table) in text
    assert "not applicable  per-patch statistics" in text


def test_check_shows_details_and_tries_the_chosen_preconditioner(capsys):
    assert main(["check", *SMALL, "--only", "T2", "--preconditioner", "kfac", "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "the preconditioner is KroneckerPreconditioner, not BNP's" in text
    assert "(P is invertible): True" in text


def test_exit_status_of_check(monkeypatch, capsys):
    def wrong(risk, P):
        return in_coordinates(risk, P).at(torch.zeros(risk.space.dim, dtype=torch.float64))

    in_coordinates = coordinates.in_coordinates
    assert main(["check", *SMALL, "--only", "prop9"]) == 2, "nothing applies"
    assert main(["check", *SMALL, "--only", "T2", "--dtype", "float32"]) == 2, "not in single precision"
    assert main(["check", *SMALL, "--only", "T2", "--time-limit", "0"]) == 2, "nothing was tried"
    assert main(["check", *SMALL, "--only", "T99"]) == 2
    assert "T99; there are: Theorem 1 (T14), Prop. 2" in capsys.readouterr().err
    monkeypatch.setattr(coordinates, "in_coordinates", wrong)
    assert main(["check", *SMALL, "--only", "T2"]) == 1
    assert " fails " in capsys.readouterr().out


def test_an_interrupted_check_keeps_what_was_made(tmp_path, monkeypatch, capsys):
    def stop(risk, P):
        raise KeyboardInterrupt

    monkeypatch.setattr(coordinates, "in_coordinates", stop)
    out = tmp_path / "c.json"
    assert main(["check", *SMALL, "--only", "T1", "T2", "--json", str(out)]) == 130
    table = bnp.theory.CheckTable.load(out)
    assert {check.source for check in table.checks} == {"Prop. 2 (T1)"}
    assert "interrupted in Theorem 3 (T2)" in capsys.readouterr().out


def test_an_interrupt_in_the_rates_keeps_what_was_made(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("bnp_analysis.cli.check.rates_of", stop)
    out = tmp_path / "c.json"
    assert main(["check", *SMALL, "--only", "prop9", "--rates", "0.5", "--json", str(out)]) == 130
    table = bnp.theory.CheckTable.load(out)
    assert {check.source for check in table.checks} == {"Prop. 9 (T1)"}
    assert table.stop == "interrupted in the rates"
    assert "interrupted in the rates" in capsys.readouterr().out


def test_check_observes_rates_if_asked(capsys):
    larger = ["--samples", "60", "--hidden", "6"]  # its minimum is not reached, so that the rates take no time
    assert main(["check", *SMALL, *larger, "--only", "T2", "--rates", "0.5"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Theorem 1", "T14", "T15"))]
    assert len(lines) == 4
    assert all("not applicable" in line and "[this network]" in line for line in lines)
