"""`bnp-analysis train`: an option that is read under another name or not at all, a wrong exit status, files that do not
carry the run, and a resumed command that is not the uninterrupted one are caught here."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time

import pytest
import torch

from bnp_analysis.cli import parser_of
from bnp_analysis.cli.options import experiment_of
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.experiment import Experiment, split
from bnp_analysis.training.run import Run

SMALL = ["--samples", "60", "--hidden", "6", "--epochs", "2", "--batch-size", "16", "--quiet"]


def parse(*words: str) -> argparse.Namespace:
    return parser_of("train").parse_args(words)


def main(*words: str) -> int:
    arguments = parse(*words)
    return arguments.run(arguments)


def test_every_option_of_the_problem_reaches_the_experiment():
    words = (
        "--data mnist --samples 99 --standardize --model cnn --hidden 5 4 --activation tanh --norm group "
        "--norm-at input --preconditioner bnp --bnp rho=0.9 q=measured --optimizer adamw --lr 0.3 --weight-decay 0.1 "
        "--schedule step --batch-size 7 --epochs 3 --seed 8 --device meta"
    )
    assert experiment_of(parse(*words.split())) == Experiment(
        data="mnist", samples=99, standardize=True, model="cnn", hidden=(5, 4), activation="tanh", norm="group",
        norm_at="input", preconditioner="bnp", bnp={"rho": 0.9, "q": "measured"}, optimizer="adamw", lr=0.3,
        weight_decay=0.1, schedule="step", batch_size=7, epochs=3, seed=8, device="meta",
    )  # fmt: skip
    assert experiment_of(parse()) == Experiment()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; known: sgd, momentum, adam, adamw"),
        ({"schedule": "linear"}, "unknown schedule 'linear'; known: constant, cosine, step"),
        ({"preconditioner": "kfac"}, "unknown preconditioner 'kfac'; known: none, bnp"),
    ],
)
def test_an_experiment_names_what_there_is(wrong, words):
    with pytest.raises(InvalidInputError, match=words):
        Experiment(**wrong)


def test_an_experiment_may_not_hold_out_everything():
    with pytest.raises(InvalidInputError, match=r"holdout=0\.99 of 10 examples leaves none"):
        split(Experiment(samples=10, holdout=0.99))
    train, held = split(Experiment(samples=10, holdout=0.9))
    assert (len(train[1]), len(held[1])) == (1, 9)


def test_it_prints_and_writes_what_it_did(tmp_path, capsys):
    files = ["--json", str(tmp_path / "r.json"), "--log", str(tmp_path / "l.jsonl")]
    assert main(*SMALL, "--preconditioner", "bnp", "--probe", "fc1", "--probe-every", "4", *files) == 0
    text = capsys.readouterr().out
    for word in ("epoch   2", "accuracy", "condition of fc1", "(exact)", "(trained)", "finished"):
        assert word in text
    run = Run.load(tmp_path / "r.json")
    assert len(run.loss) == 8
    assert run.settings["experiment"]["preconditioner"] == "bnp"
    assert [row["step"] for row in run.probes] == [0, 4, 8]
    entries = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in entries if e["kind"] == "step"] == run.loss.tolist()


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group", "renorm"])
@pytest.mark.parametrize("preconditioner", ["none", "bnp"])
def test_every_normalization_goes_with_and_without_bnp(norm, preconditioner, capsys):
    assert main(*SMALL, "--norm", norm, "--preconditioner", preconditioner) == 0


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_optimizers_and_schedules(optimizer, schedule, tmp_path, capsys):
    out = tmp_path / "r.json"
    words = ["--optimizer", optimizer, "--schedule", schedule, "--lr", "0.01", "--epochs", "3", "--json", str(out)]
    assert main(*SMALL, *words) == 0
    run = Run.load(out)
    if schedule == "step":
        assert run.lr.tolist() == pytest.approx([0.01] * 4 + [0.001] * 4 + [0.0001] * 4)
    else:
        steps = torch.arange(12, dtype=torch.float64)
        assert run.lr.tolist() == pytest.approx((0.005 * (1 + torch.cos(torch.pi * steps / 12))).tolist())


def test_batch_size_one_trains_with_bnp_and_is_refused_with_batch_norms(capsys):
    one = ["--batch-size", "1", "--epochs", "1"]
    assert main(*SMALL, *one, "--preconditioner", "bnp", "--lr", "0.05") == 0
    for norm in ("batch", "renorm"):
        with pytest.raises(InvalidInputError, match="more than one value per channel"):
            main(*SMALL, *one, "--norm", norm)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_and_resume_gives_the_uninterrupted_run(name, status, tmp_path, capsys):
    def words(folder: str) -> list[str]:
        files = [f"--{kind}={tmp_path / folder / kind}" for kind in ("json", "log", "checkpoint")]
        return [*SMALL, "--preconditioner", "bnp", "--norm", "batch", "--epochs", "20", *files]

    def ask() -> None:
        log = tmp_path / "a" / "log"
        while not (log.exists() and log.read_bytes().count(b"step") > 20):
            time.sleep(0.001)
        os.kill(os.getpid(), getattr(signal, name))

    thread = threading.Thread(target=ask)
    thread.start()
    assert main(*words("a")) == status
    thread.join()
    assert f"{name} after step" in capsys.readouterr().out
    assert len(Run.load(tmp_path / "a" / "json").loss) < 80
    with pytest.raises(InvalidInputError, match="--resume"):
        main(*words("a"))
    assert main(*words("a"), "--resume") == 0
    assert main(*words("b"), "--resume") == 0
    assert Run.load(tmp_path / "a" / "json") == Run.load(tmp_path / "b" / "json")


def test_divergence_and_bad_input_have_their_status(capsys):
    assert main(*SMALL, "--lr", "1e30") == 1
    assert "diverged: the loss is" in capsys.readouterr().out
    for words, message in (
        (["--resume"], "needs --checkpoint"),
        (["--bnp", "rho=0.9"], "preconditioner='bnp'"),
        (["--preconditioner", "bnp", "--bnp", "rho"], "OPTION=VALUE"),
        (["--preconditioner", "bnp", "--bnp", "no_such=1"], "no_such"),
        (["--lr", "-1"], "lr=-1"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            main(*SMALL, *words)
