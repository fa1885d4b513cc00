"""What `condition`, `spectrum` and `check` measure: the options that describe it, and the risk they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bnp_analysis import data, models, precondition
from bnp_analysis.curvature.engines import ENGINES
from bnp_analysis.distributed import ALONE
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import Preconditioner
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.training import fit

DTYPES = {"float32": torch.float32, "float64": torch.float64}
PRECONDITIONERS: dict[str, Callable[[EmpiricalRisk], Any]] = {
    "bnp": precondition.bnp_preconditioner,
    "bnp-damped": lambda risk: precondition.bnp_preconditioner(risk, eps1=1e-2, eps2=1e-4),
    "diagonal": lambda risk: precondition.diagonal_preconditioner(risk, damping=1e-6),
    "kfac": precondition.kfac_preconditioner,
}


def network_options(parser: argparse.ArgumentParser, *, samples: int | None, hidden: list[int]) -> None:
    """The options that describe data and network, with their defaults; `samples` None takes all."""
    add = parser.add_argument
    add("--data", choices=data.names(), default="digits", help="data set; digits is embedded")
    add("--data-dir", metavar="DIR", help="where its files are; default: the variable BNP_ANALYSIS_DATA")
    add("--download", action="store_true", help="fetch missing files (needs the extra 'download')")
    add("--samples", type=int, default=samples, metavar="N", help="training examples used; all if not given")
    add("--standardize", action="store_true", help="standardize the inputs instead of raw pixels in [0, 1]")
    add("--model", choices=list(models.MODELS), default="mlp", help="network")
    add("--hidden", type=int, nargs="+", default=hidden, metavar="WIDTH", help="hidden widths of the mlp")
    add("--activation", choices=list(models.ACTIVATIONS), default="relu", help="activation")
    add("--norm", choices=list(models.NORMS), default="none", help="normalization layers")


def problem_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe what is measured: data, network, point, preconditioner, precision."""
    network_options(parser, samples=1000, hidden=[16, 12])
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="state dict to measure at; implies --epochs 0 unless given")
    add("--epochs", type=int, help="epochs of plain SGD before measuring (default: 3, or 0 with a checkpoint)")
    add("--lr", type=float, default=0.05, help="learning rate of that training")
    add("--preconditioner", choices=list(PRECONDITIONERS), default="bnp", help="P")
    add("--dtype", choices=list(DTYPES), default="float64", help="precision of the measurement")
    add("--device", default="cpu", help="device of the measurement")
    add("--seed", type=int, default=0, help="of subset, initialization, training and random starts")
    add("--json", metavar="FILE", help="write the result with its settings")
    add("--quiet", action="store_true", help="no progress bars")


def engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="keep recorded graphs, or recompute them")
    parser.add_argument("--max-memory", type=float, metavar="MIB", help="that kept graphs and a product may take")


def engine_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords `engine` and `max_memory` of operators."""
    limit = None if arguments.max_memory is None else int(2**20 * arguments.max_memory)
    return {"engine": arguments.engine, "max_memory": limit}


def figure_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure", metavar="FILE", help="write the figure; the suffix says the format")


def checked_problem(arguments: argparse.Namespace) -> tuple[EmpiricalRisk, Preconditioner | None]:
    """What `check` is to try: the risk, and the preconditioner unless it is BNP's own."""
    risk, name = risk_of(arguments), arguments.preconditioner
    return risk, None if name == "bnp" else PRECONDITIONERS[name](risk)


def risk_of(arguments: argparse.Namespace) -> EmpiricalRisk:
    """Data, network, a little training, and the risk at the point reached."""
    group = getattr(arguments, "group", ALONE)
    if arguments.download and group.size > 1:
        raise InvalidInputError(
            "--download in several processes would fetch the same files several times at once; fetch them first, "
            "without torchrun"
        )
    flat = arguments.model == "mlp"
    source = {"data_dir": arguments.data_dir, "download": arguments.download, "seed": arguments.seed}
    found = data.load(arguments.data, n=arguments.samples, standardize=arguments.standardize, flatten=flat, **source)
    sizes = {"hidden": arguments.hidden} if flat else {}
    model = models.build_for(
        arguments.model,
        found.input_shape,
        found.num_classes,
        activation=arguments.activation,
        norm=arguments.norm,
        seed=arguments.seed,
        **sizes,
    )
    if arguments.checkpoint:
        _load(model, Path(arguments.checkpoint))
    epochs = arguments.epochs if arguments.epochs is not None else (0 if arguments.checkpoint else 3)
    loss = torch.nn.functional.cross_entropy
    losses = fit(model, loss, found.tensors, epochs=epochs, lr=arguments.lr, seed=arguments.seed)
    model.eval()
    # Every process has trained on all of it; on unlike machines not to the same bits.
    model.load_state_dict(group.from_first(model.state_dict(), "the trained parameters"))
    shard, dtype = group.shard(found.tensors), DTYPES[arguments.dtype]
    risk = EmpiricalRisk(model, loss, shard, dtype=dtype, device=arguments.device, group=group)
    trained = f"{epochs} epochs, loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "not trained here"
    print(f"{arguments.data}: {len(found)} examples; {arguments.model}, {risk.space.dim} parameters; {trained}")
    return risk


def _load(model: torch.nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("model", state) if isinstance(state, dict) else state)
    except FileNotFoundError as error:
        raise InvalidInputError(f"no checkpoint at {path}") from error
    except Exception as error:
        raise InvalidInputError(
            f"the checkpoint {path} does not fit {type(model).__name__}: {error}. Give the --model and --hidden that "
            "it was saved from; files with arbitrary pickled objects are not read"
        ) from error
