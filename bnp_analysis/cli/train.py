"""`bnp-analysis train`: parse, call, print."""

from __future__ import annotations

import argparse
from pathlib import Path

from bnp_analysis import models
from bnp_analysis.cli.options import experiment_of, network_options, require_parts, write
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.experiment import OPTIMIZERS, PRECONDITIONERS, SCHEDULES, build, load, run_experiment
from bnp_analysis.training.probes import ConditionProbe
from bnp_analysis.training.run import Run

EXIT = {"finished": 0, "diverged": 1, "SIGINT": 130, "SIGTERM": 143}


def train(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog = (
        "Exit status: 0 finished, 1 diverged, 2 bad input, 130 stopped by SIGINT, 143 by SIGTERM (state saved)."
    )
    network_options(parser, samples=None, hidden=[100, 100, 100], lr=0.1)
    add = parser.add_argument
    add("--norm-at", choices=list(models.NORM_PLACES), default="preactivation", help="place of the normalization")
    add(
        "--preconditioner",
        choices=PRECONDITIONERS,
        default="none",
        help="preconditioner of the gradients, in addition to any normalization",
    )
    add("--bnp", nargs="+", default=[], metavar="OPTION=VALUE", help="options of BNP, such as rho=0.9 q=measured")
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="momentum is SGD with momentum 0.9")
    add("--weight-decay", type=float, default=0.0, help="weight decay of the optimizer")
    add(
        "--schedule",
        choices=SCHEDULES,
        default="constant",
        help="of the learning rate: cosine decays to 0, step divides by 10 twice",
    )
    add("--batch-size", type=int, default=60, help="examples per step; 1 is not allowed with --norm batch or renorm")
    add("--epochs", type=int, default=10, help="total number of epochs, including those before a resumed checkpoint")
    add("--probe", nargs="+", default=[], metavar="LAYER", help="measure the condition numbers of these layers")
    add("--probe-every", type=int, default=100, metavar="STEPS", help="steps between measurements")
    add("--probe-samples", type=int, default=200, metavar="N", help="training examples for the measurement")
    add("--log", metavar="FILE", help="write metrics of each step, epoch and probe as JSON lines")
    add(
        "--checkpoint",
        metavar="FILE",
        help="file for the state, saved each epoch, at SIGINT and SIGTERM, and at the end",
    )
    add("--checkpoint-every", type=int, metavar="STEPS", help="also save every this many steps")
    add("--resume", action="store_true", help="resume from the checkpoint if it exists, otherwise start")
    parser.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> int:
    """Run the command; the exit status gives the reason why training stopped."""
    experiment = experiment_of(arguments)
    exists = arguments.checkpoint is not None and Path(arguments.checkpoint).exists()
    if arguments.resume and arguments.checkpoint is None:
        raise InvalidInputError("--resume needs --checkpoint FILE")
    if exists and not arguments.resume:
        raise InvalidInputError(f"{arguments.checkpoint} exists: give --resume to go on from it, or another file")
    examples = load(experiment, arguments.data_dir, arguments.download)
    if arguments.probe:
        require_parts(build(experiment, examples.input_shape, examples.num_classes).model, arguments)
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
    write(run, arguments.json)
    return EXIT[run.stopped]


def report(run: Run) -> str:
    """The text that the command prints: a line per epoch and measurement, and how the run ended."""
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
