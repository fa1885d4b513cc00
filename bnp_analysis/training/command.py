"""`bnp-analysis train`: parse, call, print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnp_analysis import data, models
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.experiment import OPTIMIZERS, PRECONDITIONERS, SCHEDULES, Experiment, load, run_experiment
from bnp_analysis.training.probes import ConditionProbe
from bnp_analysis.training.run import Run

EXIT = {"finished": 0, "diverged": 1, "SIGINT": 130, "SIGTERM": 143}


def add_train_command(commands: Any) -> None:
    """Add the command to the object that `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_train_command(parser.add_subparsers())
        >>> parser.parse_args(["train", "--batch-size", "1"]).batch_size
        1
    """
    parser = commands.add_parser(
        "train",
        help="train a network, with any normalization, preconditioner and optimizer; stop and resume bit for bit",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Exit status: 0 finished, 1 diverged, 2 bad input, 130 and 143 stopped by SIGINT and SIGTERM (saved).",
    )
    _problem_options(parser)
    _run_options(parser)
    parser.set_defaults(run=run_train)


def _problem_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", choices=data.names(), default="digits", help="data set; digits is embedded")
    add("--data-dir", metavar="DIR", help="where its files are; default: the variable BNP_ANALYSIS_DATA")
    add("--download", action="store_true", help="fetch missing files (needs the extra 'download')")
    add("--samples", type=int, metavar="N", help="training examples used; default: all")
    add("--standardize", action="store_true", help="standardize the inputs instead of raw pixels in [0, 1]")
    add("--model", choices=list(models.MODELS), default="mlp", help="network")
    add("--hidden", type=int, nargs="+", default=[100, 100, 100], metavar="WIDTH", help="hidden widths of the mlp")
    add("--activation", choices=list(models.ACTIVATIONS), default="relu", help="activation")
    add("--norm", choices=list(models.NORMS), default="none", help="normalization layers")
    add("--norm-at", choices=list(models.NORM_PLACES), default="preactivation", help="their place")
    add("--preconditioner", choices=PRECONDITIONERS, default="none", help="of the gradients, beside any normalization")
    add("--bnp", nargs="+", default=[], metavar="OPTION=VALUE", help="options of bnp, such as rho=0.9 q=measured")


def _run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="momentum is sgd with 0.9")
    add("--lr", type=float, default=0.1, help="learning rate")
    add("--weight-decay", type=float, default=0.0, help="of the optimizer")
    add("--schedule", choices=SCHEDULES, default="constant", help="cosine goes to 0, step divides by 10 twice")
    add("--batch-size", type=int, default=60, help="1 is allowed, but not with batch and renorm")
    add("--epochs", type=int, default=10, help="in all, those before a resumed checkpoint included")
    add("--seed", type=int, default=0, help="of initialization, order and random layers")
    add("--device", default="cpu", help="where to train")
    add("--probe", nargs="+", default=[], metavar="LAYER", help="measure the condition number of these layers")
    add("--probe-every", type=int, default=100, metavar="STEPS", help="steps between measurements")
    add("--probe-samples", type=int, default=200, metavar="N", help="training examples measured")
    add("--json", metavar="FILE", help="write the result with its settings")
    add("--log", metavar="FILE", help="write metrics of each step, epoch and probe as JSON lines")
    add("--checkpoint", metavar="FILE", help="save here each epoch, at SIGINT and SIGTERM, and at the end")
    add("--checkpoint-every", type=int, metavar="STEPS", help="save also after this many steps")
    add("--resume", action="store_true", help="go on from the checkpoint, or start where there is none yet")
    add("--quiet", action="store_true", help="no progress bar")


def run_train(arguments: argparse.Namespace) -> int:
    """Run the command; the exit status says why training stopped."""
    experiment = experiment_of(arguments)
    exists = arguments.checkpoint is not None and Path(arguments.checkpoint).exists()
    if arguments.resume and arguments.checkpoint is None:
        raise InvalidInputError("--resume needs --checkpoint FILE")
    if exists and not arguments.resume:
        raise InvalidInputError(f"{arguments.checkpoint} exists: give --resume to go on from it, or another file")
    examples = load(experiment, arguments.data_dir, arguments.download)
    x, y = (part[: arguments.probe_samples] for part in examples.tensors)
    probes = [ConditionProbe(layer, arguments.probe_every, (x, y), seed=arguments.seed) for layer in arguments.probe]
    run = run_experiment(
        experiment,
        data_dir=arguments.data_dir,
        download=arguments.download,
        probes=probes,
        log=arguments.log,
        checkpoint=arguments.checkpoint,
        checkpoint_every=arguments.checkpoint_every,
        progress=not arguments.quiet,
    )
    print(
        f"{experiment.data}: {len(examples)} examples; {experiment.model}, {experiment.label}, {experiment.optimizer}"
    )
    print(report(run))
    if arguments.json:
        run.save(arguments.json)
        print(f"wrote {arguments.json}")
    return EXIT[run.stopped]


def experiment_of(arguments: argparse.Namespace) -> Experiment:
    """The experiment that the options describe."""
    given = vars(arguments)
    names = set(Experiment.__dataclass_fields__) & given.keys() - {"hidden", "bnp"}
    options = dict(_option(word) for word in arguments.bnp)
    return Experiment(**{n: given[n] for n in names}, hidden=tuple(arguments.hidden), bnp=options)


def _option(word: str) -> tuple[str, str | float]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise InvalidInputError(f"--bnp takes OPTION=VALUE, not {word!r}")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def report(run: Run) -> str:
    """The text that the command prints: a line per epoch and measurement, and how it ended."""
    lines = []
    for row in run.records():
        words = "  ".join(f"{n} {row[n]:.4f}" for n in ("train_loss", "eval_loss", "accuracy") if n in row)
        lines.append(f"epoch {row['epoch']:>3}  step {row['step']:>6}  {words}  {row['seconds']:.1f} s")
    for found in run.probes:
        lines.append(
            f"step {found['step']:>6}  {found['probe']}: {found['condition']:.4g}, with P "
            f"{found['condition_with_p']:.4g} ({found['preconditioner']})"
        )
    return "\n".join([*lines, f"{run.stopped}: {run.message}"])
