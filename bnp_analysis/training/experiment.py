"""The description of an experiment, and the parts of the training run that it defines."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis import data, models
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.run import Run
from bnp_analysis.training.steps import StepsGradients
from bnp_analysis.training.trainer import train

Pair = tuple[Tensor, Tensor]
Parameters = Sequence[nn.Parameter]

#: Name to factory `(parameters, lr, weight_decay)`.
OPTIMIZERS: dict[str, Callable[[Parameters, float, float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr, decay: torch.optim.SGD(p, lr=lr, weight_decay=decay),
    "momentum": lambda p, lr, decay: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=decay),
    "adam": lambda p, lr, decay: torch.optim.Adam(p, lr=lr, weight_decay=decay),
    "adamw": lambda p, lr, decay: torch.optim.AdamW(p, lr=lr, weight_decay=decay),
}
SCHEDULES = ("constant", "cosine", "step")
PRECONDITIONERS = ("none", "bnp")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a training run, but for where files lie.

    Args:
        data: name of a data set; `samples` of its training examples, all by default; `standardize` the inputs.
        model: name of a network; `hidden` widths of the mlp; `activation`.
        norm, norm_at: normalization layers and their place.
        preconditioner: "none" or "bnp", beside any normalization; `bnp` its options.
        optimizer: "sgd", "momentum" (0.9), "adam" or "adamw", with `lr` and `weight_decay`.
        schedule: of the learning rate, "constant", "cosine" (to 0 along all steps) or "step" (a tenth after each
            third of the epochs).
        batch_size, epochs: of the run.
        seed: of the initialization, the order and random layers.
        holdout: this part of the training examples, the same for every seed, is evaluated in place of the test set.
        device: where to train.

    Example:
        >>> Experiment(preconditioner="bnp", norm="group").label
        'group + bnp'
    """

    data: str = "digits"
    samples: int | None = None
    standardize: bool = False
    model: str = "mlp"
    hidden: tuple[int, ...] = (100, 100, 100)
    activation: str = "relu"
    norm: str = "none"
    norm_at: str = "preactivation"
    preconditioner: str = "none"
    bnp: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 0.0
    schedule: str = "constant"
    batch_size: int = 60
    epochs: int = 10
    seed: int = 0
    holdout: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        choices = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "preconditioner": PRECONDITIONERS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InvalidInputError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if not (self.lr > 0 and 0 <= self.holdout < 1 and self.weight_decay >= 0):
            raise InvalidInputError(
                f"lr={self.lr} > 0, weight_decay={self.weight_decay} >= 0 and 0 <= holdout={self.holdout} < 1 must hold"
            )
        if self.bnp and self.preconditioner != "bnp":
            raise InvalidInputError("options of BNP need preconditioner='bnp'")

    @property
    def label(self) -> str:
        """The method: normalization and preconditioner."""
        return " + ".join(part for part in (self.norm, self.preconditioner) if part != "none") or "plain"

    def settings(self) -> dict[str, Any]:
        """All fields as JSON data."""
        return asdict(self) | {"hidden": list(self.hidden), "bnp": dict(self.bnp)}


@dataclass
class Prepared:
    """The parts of a training run."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    preconditioner: StepsGradients | None
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy


def build(experiment: Experiment, input_shape: tuple[int, ...], num_classes: int) -> Prepared:
    """The network, optimizer and preconditioner of an experiment.

    Raises:
        InvalidInputError: names or sizes that do not fit.
        MemoryLimitError: the network does not fit into memory.
    """
    options: dict[str, Any] = {"hidden": experiment.hidden} if experiment.model == "mlp" else {}
    if options:
        weights = sum(a * b for a, b in pairwise((math.prod(input_shape), *experiment.hidden, num_classes)))
        require_memory(4 * weights, f"a network of {weights:.3g} weights", "Use smaller hidden widths")
    for name in ("activation", "norm", "norm_at", "seed"):
        options[name] = getattr(experiment, name)
    model = models.build_for(experiment.model, input_shape, num_classes, **options).to(experiment.device)
    optimizer = OPTIMIZERS[experiment.optimizer](list(model.parameters()), experiment.lr, experiment.weight_decay)
    try:
        pre = BNP(model, **experiment.bnp) if experiment.preconditioner == "bnp" else None
    except TypeError as error:
        raise InvalidInputError(f"options of BNP: {error}") from error
    return Prepared(model, optimizer, pre)


#: One read for all runs of a process; nothing of a run changes the tensors.
_read = functools.lru_cache(maxsize=4)(data.load)


def load(
    experiment: Experiment,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    *,
    part: str = "train",
) -> data.Dataset:
    """The training examples, all of them; see `split` for what is held out; or those of another part."""
    return _read(
        experiment.data,
        split=part,
        n=experiment.samples if part == "train" else None,
        standardize=experiment.standardize,
        flatten=experiment.model == "mlp",
        data_dir=None if data_dir is None else os.fspath(data_dir),
        download=download,
    )


def split(experiment: Experiment, data_dir: str | None = None, download: bool = False) -> tuple[Pair, Pair]:
    """Examples to train with, and to evaluate with: the test set, or those held out."""
    x, y = load(experiment, data_dir, download).tensors
    if not experiment.holdout:
        return (x, y), load(experiment, data_dir, download, part="test").tensors
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held = max(1, round(experiment.holdout * len(y)))
    if held >= len(y):
        raise InvalidInputError(f"holdout={experiment.holdout} of {len(y)} examples leaves none to train with")
    return (x[order[held:]], y[order[held:]]), (x[order[:held]], y[order[:held]])


def run_experiment(
    experiment: Experiment, *, data_dir: str | None = None, download: bool = False, **options: Any
) -> Run:
    """Train what an experiment describes.

    Args:
        experiment: the description.
        data_dir, download: where the files of the data set are, and whether to fetch them.
        **options: further arguments of `train`: `probes`, `log`, `checkpoint`, `progress`, ...

    Returns:
        The `Run`, with the experiment among its settings.

    Raises:
        InvalidInputError: settings that do not fit.

    Example:
        >>> run = run_experiment(Experiment(samples=100, hidden=(8,), epochs=1, preconditioner="bnp"))
        >>> run.stopped, len(run.loss), run.settings["experiment"]["preconditioner"]
        ('finished', 2, 'bnp')
    """
    examples = load(experiment, data_dir, download)
    made = build(experiment, examples.input_shape, examples.num_classes)
    pair, eval_pair = split(experiment, data_dir, download)
    steps = experiment.epochs * -(-len(pair[1]) // max(experiment.batch_size, 1))
    scheduler: Any = None
    if experiment.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(made.optimizer, max(steps, 1))
    elif experiment.schedule == "step":
        scheduler = torch.optim.lr_scheduler.StepLR(made.optimizer, max(-(-experiment.epochs // 3), 1))
    run = train(
        made.model,
        made.loss,
        pair,
        made.optimizer,
        preconditioner=made.preconditioner,
        scheduler=scheduler,
        schedule_by="step" if experiment.schedule == "cosine" else "epoch",
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        eval_data=eval_pair,
        seed=experiment.seed,
        **options,
    )
    return replace(run, settings=dict(run.settings) | {"experiment": experiment.settings()})
