"""Options, the network and the risk that several commands share, and runs in several processes."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from bnp_analysis import data, models, precondition
from bnp_analysis.curvature.engines import ENGINES
from bnp_analysis.distributed import ALONE, initialize
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.network.layers import layers_of
from bnp_analysis.results import Result
from bnp_analysis.runtime.files import load_tensors, require_outputs
from bnp_analysis.runtime.kinds import RANGES, require_range
from bnp_analysis.training import fit
from bnp_analysis.training.bnp.layers import trainable_space
from bnp_analysis.training.experiment import Experiment, build

Command = Callable[[argparse.Namespace], int]

#: Option -> the files that a command writes for it.
Outputs = dict[str, list[str | Path]]
_FIGURES = (".png", ".pdf", ".svg", ".eps", ".ps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PRECONDITIONERS: dict[str, Callable[[EmpiricalRisk], Any]] = {
    "bnp": precondition.bnp_preconditioner,
    "bnp-damped": lambda risk: precondition.bnp_preconditioner(risk, eps1=1e-2, eps2=1e-4),
    "diagonal": lambda risk: precondition.diagonal_preconditioner(risk, damping=1e-6),
    "kfac": precondition.kfac_preconditioner,
}


def network_options(parser: argparse.ArgumentParser, *, samples: int | None, hidden: list[int], lr: float) -> None:
    """Add the options of every command: data and network (`samples=None` takes all examples), and output."""
    add = parser.add_argument
    add("--data", choices=data.names(), default="digits", help="data set; digits is embedded")
    add("--data-dir", metavar="DIR", help="folder of the data files; default: the variable BNP_ANALYSIS_DATA")
    add("--download", action="store_true", help="fetch missing files (needs the extra 'download')")
    number = "number of training examples" + ("; all if not given" if samples is None else "")
    add("--samples", type=int, default=samples, metavar="N", help=number)
    add("--standardize", action="store_true", help="standardize the inputs; otherwise pixels lie in [0, 1]")
    add("--model", choices=list(models.MODELS), default="mlp", help="network")
    add("--hidden", type=int, nargs="+", default=hidden, metavar="WIDTH", help="hidden widths of the mlp")
    add("--activation", choices=list(models.ACTIVATIONS), default="relu", help="activation")
    add("--norm", choices=list(models.NORMS), default="none", help="normalization layers")
    add("--lr", type=float, default=lr, help="learning rate of the training")
    add("--device", default="cpu", help="device of the training (train) or of the measurement (other commands)")
    add("--seed", type=int, default=0, help="random seed of subset, initialization, training and random starts")
    add("--json", metavar="FILE", help="write the result with its settings")
    add("--quiet", action="store_true", help="show no progress bars")


def problem_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a measurement: data, network, parameters, preconditioner, precision."""
    network_options(parser, samples=1000, hidden=[16, 12], lr=0.05)
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="FILE",
        help="state dict of the network to measure; without --epochs it is not trained further",
    )
    add("--epochs", type=int, help="epochs of plain SGD before measuring (default: 3, or 0 with a checkpoint)")
    add("--preconditioner", choices=list(PRECONDITIONERS), default="bnp", help="preconditioner P")
    add("--dtype", choices=list(DTYPES), default="float64", help="precision of the measurement")


def operator_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of operators: a problem, the computation of products, several processes, a figure."""
    problem_options(parser)
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="auto", help="keep autograd graphs between products, or recompute them")
    add("--max-memory", type=float, metavar="MIB", help="memory limit for kept graphs and a product")
    late = "under torchrun: time that processes wait for a late one before they fail"
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help=late)
    add("--figure", metavar="FILE", help="write a figure; the suffix selects the format")
    parser.set_defaults(group=ALONE)


def require_arguments(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range, an unknown device and files that could not be written, before anything is computed.

    Raises:
        InvalidInputError: names the option.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in given.keys() & RANGES.keys():
        if isinstance(given[name], int | float):
            require_range(name, given[name])
    if min(given.get("hidden", [1])) < 1:
        raise InvalidInputError("the widths of --hidden must be at least 1")
    try:
        torch.empty(1, device=given["device"]).item() if "device" in given else None
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"--device {given['device']}: {str(error).splitlines()[0]}") from error
    read = [given["checkpoint"]] if "checkpoint" in given and "log" not in vars(arguments) else []
    require_outputs(getattr(arguments, "outputs", outputs_of)(arguments), read={"--checkpoint": read})
    if "blocks" in given and given["probes"] < 2:
        raise InvalidInputError(f"--probes {given['probes']}: the noise of a distance needs at least two")
    if "figure" in given and Path(given["figure"]).suffix.lower() not in _FIGURES:
        raise InvalidInputError(f"--figure {given['figure']}: the suffix must be one of {', '.join(_FIGURES)}")


def outputs_of(arguments: argparse.Namespace) -> Outputs:
    """The files that a command writes, by option; a command that writes more sets its own function as `outputs`.

    Example:
        >>> outputs_of(argparse.Namespace(json="a.json", log=None, checkpoint="a.pt"))
        {'--json': ['a.json'], '--checkpoint': ['a.pt']}
    """
    own = ["json", "figure", *(["log", "checkpoint"] if hasattr(arguments, "log") else [])]  # else it is read
    given = {f"--{name}": getattr(arguments, name, None) for name in own}
    return {option: [path] for option, path in given.items() if path is not None}


def experiment_of(arguments: argparse.Namespace, **given: Any) -> Experiment:
    """The experiment that the options describe, with `given` in place of some of them."""
    named = {name: value for name, value in vars(arguments).items() if name in Experiment.__dataclass_fields__}
    bnp = dict(_option(word) for word in named.get("bnp", ()))
    return Experiment(**{**named, "hidden": tuple(arguments.hidden), "bnp": bnp, **given})


def _option(word: str) -> tuple[str, str | float]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise InvalidInputError(f"--bnp takes OPTION=VALUE, not {word!r}")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def risk_of(arguments: argparse.Namespace) -> EmpiricalRisk:
    """Load data, build and train the network, and return the risk at the trained parameters."""
    group = getattr(arguments, "group", ALONE)
    if arguments.download and group.size > 1:
        raise InvalidInputError(
            "--download in several processes would fetch the same files several times at once; fetch them first, "
            "without torchrun"
        )
    epochs = arguments.epochs if arguments.epochs is not None else (0 if arguments.checkpoint else 3)
    experiment = experiment_of(arguments, preconditioner="none", epochs=epochs, device="cpu")
    found = data.load(
        experiment.data,
        n=experiment.samples,
        seed=experiment.seed,
        standardize=experiment.standardize,
        flatten=experiment.model == "mlp",
        data_dir=arguments.data_dir,
        download=arguments.download,
    )
    made = build(experiment, found.input_shape, found.num_classes)
    require_parts(made.model, arguments)
    if arguments.checkpoint:
        _load(made.model, Path(arguments.checkpoint))
    losses = fit(made.model, made.loss, found.tensors, epochs=epochs, lr=experiment.lr, seed=experiment.seed)
    made.model.eval()
    # Every process has trained on all data; on different machines the bits may differ.
    made.model.load_state_dict(group.from_first(made.model.state_dict(), "the trained parameters"))
    shard, dtype = group.shard(found.tensors), DTYPES[arguments.dtype]
    risk = EmpiricalRisk(made.model, made.loss, shard, dtype=dtype, device=arguments.device, group=group)
    trained = f"{epochs} epochs, loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "not trained here"
    print(f"{arguments.data}: {len(found)} examples; {arguments.model}, {risk.space.dim} parameters; {trained}")
    return risk


def require_parts(model: torch.nn.Module, arguments: argparse.Namespace) -> None:
    """Refuse names of layers and blocks that the network does not have, before training.

    Raises:
        InvalidInputError: names the option.
    """
    covered = [layer.name for layer in layers_of(model.named_modules())[0]]
    for option in ("layers", "probe"):
        if unknown := [name for name in getattr(arguments, option, None) or [] if name not in covered]:
            known = ", ".join(covered)
            raise InvalidInputError(f"--{option}: no covered layer named {', '.join(unknown)}; there are: {known}")
    for block in getattr(arguments, "blocks", None) or []:
        try:
            trainable_space(model).indices(block)
        except InvalidInputError as error:
            raise InvalidInputError(f"--blocks: {error}") from error


def _load(model: torch.nn.Module, path: Path) -> None:
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"the checkpoint {path} is a folder, a pipe or a device, not a file")
    try:
        state = load_tensors(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidInputError(f"no checkpoint at {path}") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is {error}"
        raise InvalidInputError(f"the checkpoint {path} cannot be read: {why}") from error
    try:
        model.load_state_dict(state.get("model", state) if isinstance(state, dict) else state)
    except Exception as error:
        raise InvalidInputError(
            f"the checkpoint {path} does not fit {type(model).__name__}: {' '.join(str(error).split())} Give the "
            "--model and --hidden that it was saved from"
        ) from error


def write(result: Result, path: str | Path | None) -> None:
    """Save a result and print the path, if a file is given."""
    if path is not None:
        print(f"wrote {result.save(path)}")


def draw(save: str, result: Any, arguments: argparse.Namespace, title: str = "") -> None:
    """Draw a result by a function of `plotting` and print the path, if a file is given."""
    if arguments.figure:
        plotting = importlib.import_module("bnp_analysis.plotting")  # importing matplotlib is slow
        getattr(plotting, save)(result, arguments.figure, f"{arguments.data}, {arguments.model}{title}")
        print(f"wrote {arguments.figure}")


def in_processes(run: Command) -> Command:
    """Run a command in all processes that `torchrun` launched; the first one prints and writes."""

    @functools.wraps(run)
    def over_all(arguments: argparse.Namespace) -> int:
        with initialize(timeout=arguments.timeout) as group:
            arguments.group = group
            if group.rank == 0:
                return run(arguments)
            arguments.json = arguments.figure = None
            arguments.quiet = True
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                return run(arguments)

    return over_all
