"""The result of a training run, its log, and its complete state, which is restored bit for bit."""

from __future__ import annotations

import inspect
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bnp_analysis.distributed.group import digest
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.results import Result, plain
from bnp_analysis.runtime.files import read_state, write_state, writing
from bnp_analysis.runtime.trees import map_tensors

#: Why a run stopped.
FINISHED, DIVERGED, SIGNALS = "finished", "diverged", ("SIGINT", "SIGTERM")


@dataclass(frozen=True, kw_only=True)
class Run(Result):
    """A training run: metrics of each step and epoch, and why it stopped.

    Args:
        loss: `(steps,)` float64, the mini-batch loss before each update; the last one is NaN or infinite where
            the run diverged.
        lr: `(steps,)` float64, the learning rate of each step (of the first parameter group).
        epochs: one dict per finished epoch: `epoch` from 1, `step`, `train_loss` (mean over the epoch's
            examples), `lr`, and with evaluation data `eval_loss` and, for classes, `accuracy`.
        epoch_seconds: training time until the end of each epoch, without evaluation and probes.
        probes: one dict per measurement: `probe`, `step`, and what the probe found.
        stopped: "finished", "diverged", "SIGINT" or "SIGTERM".
        message: what that means, and the way on.
        checkpoint: the file with the last state, or None.

    Example:
        >>> run = Run(loss=np.array([2.0, 1.0]), lr=np.array([0.1, 0.1]), seed=0)
        >>> print(run)
        finished after 2 steps, 0 epochs; last loss 1
    """

    loss: npt.NDArray[np.float64]
    lr: npt.NDArray[np.float64]
    epochs: tuple[Mapping[str, Any], ...] = ()
    epoch_seconds: tuple[float, ...] = field(default=(), compare=False)
    probes: tuple[Mapping[str, Any], ...] = ()
    stopped: str = FINISHED
    message: str = ""
    checkpoint: str | None = field(default=None, compare=False)

    @property
    def finished(self) -> bool:
        """Whether all epochs were done."""
        return self.stopped == FINISHED

    @property
    def final(self) -> Mapping[str, Any]:
        """The metrics of the last finished epoch; empty where there is none."""
        return self.epochs[-1] if self.epochs else {}

    def summary(self) -> str:
        """One line: why it stopped, where, and how good it was."""
        line = f"{self.stopped} after {len(self.loss)} steps, {len(self.epochs)} epochs"
        if len(self.loss):
            line += f"; last loss {self.loss[-1]:.4g}"
        for name in ("train_loss", "eval_loss", "accuracy"):
            if name in self.final:
                line += f", {name} {self.final[name]:.4g}"
        return line

    def records(self) -> list[dict[str, Any]]:
        """One row per epoch, with its time."""
        return [dict(row) | {"seconds": seconds} for row, seconds in zip(self.epochs, self.epoch_seconds, strict=True)]


class Log:
    """Metrics as JSON lines, each flushed, so that a killed run leaves all but its last line.

    Numbers that JSON lacks are written as the strings "nan", "inf" and "-inf".

    Args:
        path: the file, or None to write nothing.
        keep: bytes of an existing file to keep; what a killed run wrote after its checkpoint goes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = Log(Path(folder) / "log.jsonl")
        ...     log.write(kind="step", loss=float("nan")); log.close()
        ...     (Path(folder) / "log.jsonl").read_text()
        '{"kind": "step", "loss": "nan"}\\n'
    """

    def __init__(self, path: str | os.PathLike[str] | None, keep: int = 0) -> None:
        self._file: IO[bytes] | None = None
        if path is None:
            return
        self._path = Path(path)
        with writing(path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            how = "r+b" if keep and self._path.exists() else "wb"
            self._file = open(path, how, buffering=0)  # noqa: SIM115 - open as long as the run, see close()
            self._file.truncate(min(keep, self._file.seek(0, os.SEEK_END)))
            self._file.seek(0, os.SEEK_END)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return 0 if self._file is None else self._file.tell()

    def write(self, **entry: Any) -> None:
        """Append a line."""
        if self._file is not None:
            line = json.dumps(plain(entry, strict=True), allow_nan=False).encode() + b"\n"
            with writing(self._path):
                while line:  # a disk that fills up takes a part, and then says why
                    line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


FORMAT = "bnp_analysis.training/2"


class Stateful(Protocol):
    """What an optimizer, a scheduler and a preconditioner have in common."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass
class Parts:
    """Everything whose state belongs to a run.

    Args:
        model: its parameters and all its buffers, those outside the state dict included.
        others: the optimizer, and where there is one the scheduler and the preconditioner, by name.
        generators: of the data order.
    """

    model: nn.Module
    others: dict[str, Stateful]
    generators: list[torch.Generator] = field(default_factory=list)

    def take(self) -> dict[str, Any]:
        """The states now; tensors are shared with the run, not copied."""
        state = self.model.state_dict()
        hidden = {name: b for name, b in self.model.named_buffers(remove_duplicate=False) if name not in state}
        taken = {name: other.state_dict() for name, other in self.others.items()}
        return {"model": dict(state), "hidden_buffers": hidden, "now": random_states()} | taken

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Restore states taken from parts of the same kind, but for the generators of the data order.

        Raises:
            InvalidInputError: they do not fit.
        """
        before = copied(self.take())
        try:
            self._put(state)
        except Exception as error:
            self._put(before)
            words = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InvalidInputError(
                f"the checkpoint does not fit this run, or is damaged; nothing was changed: {words}"
            ) from error

    def _put(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for name, value in state["hidden_buffers"].items():
            buffers[name].copy_(value)
        for name, other in self.others.items():
            other.load_state_dict(state[name])
        set_random_states(state["now"])

    def order(self) -> dict[str, Any]:
        """The random states that decide the order of an epoch which begins now."""
        return {"generators": [g.get_state() for g in self.generators], "global": random_states()}

    def set_order(self, state: Mapping[str, Any]) -> None:
        """Restore them, so that the same epoch begins again."""
        if len(state["generators"]) != len(self.generators):
            raise InvalidInputError("the checkpoint is of a loader with other generators; resume with the same loader")
        for generator, own in zip(self.generators, state["generators"], strict=True):
            generator.set_state(own)
        set_random_states(state["global"])


def copied(state: Any) -> Any:
    """A state whose tensors later training does not change."""
    return map_tensors(state, lambda t: t.detach().clone())


def random_states() -> dict[str, Any]:
    """The global random states of torch, its accelerators in use, NumPy and Python."""
    # NumPy's old global state, no generator of ours: a loader's augmentation may draw from it.
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore them."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state, atomically and to the disk: the old file or the whole new one, nothing between."""
    write_state(path, {"format": FORMAT} | dict(state))


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state that `save_state` wrote, on the CPU.

    Raises:
        InvalidInputError: damaged, or something else; files with arbitrary pickled objects are not read.
    """
    found = read_state(path, "the checkpoint of a training run")
    form = found.get("format")
    if form != FORMAT:
        raise InvalidInputError(f"{path} has the format {form}; this version reads {FORMAT}")
    return found


def require_same(path: str | os.PathLike[str], saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under settings that are not its own.

    Raises:
        InvalidInputError: naming what differs.
    """
    listed = "; ".join(_differences(saved, given))
    if listed:
        raise InvalidInputError(
            f"{path} holds another run ({listed}). Resuming would mix two runs: delete it, or give another checkpoint="
        )


def _differences(saved: Mapping[str, Any], given: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What differs, in words; of settings inside settings only those that do."""
    for name in sorted(saved.keys() | given.keys()):
        there, here = saved.get(name), given.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _differences(there, here, f"{within}{name} ")
        elif there != here:
            yield f"{within}{name}: {there!r} there, {here!r} here"


def describe_model(model: nn.Module) -> dict[str, str]:
    """What each module computes, as far as its class, its own words and the functions that it holds say.

    Example:
        >>> describe_model(nn.Sequential(nn.Linear(2, 1), nn.Tanh()))["1"]
        'Tanh()'
    """

    def words(module: nn.Module) -> str:
        held = [f"{name}={value.__name__}" for name, value in vars(module).items() if inspect.isroutine(value)]
        return f"{type(module).__name__}({', '.join(filter(None, [module.extra_repr(), *sorted(held)]))})"

    return {name: words(module) for name, module in model.named_modules() if not isinstance(module, nn.Sequential)}


def describe_tensors(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Shape, type and a number that depends on every bit and its place, of each."""
    return [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} {digest(t) & (2**64 - 1):016x}" for t in tensors]


_PROGRESS = {"last_epoch", "best", "num_bad_epochs", "cooldown_counter"}


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are words and numbers and do not change along a run."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(is_plain(item) for item in value)
        return value is None or isinstance(value, bool | int | float | str)

    kept = {n: v for n, v in values.items() if not n.startswith("_") and n not in _PROGRESS and is_plain(v)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def describe_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of an optimizer's parameter groups, with the learning rate that they started from."""
    described = []
    for group in groups:
        own = plain_settings({name: value for name, value in group.items() if name != "params"})
        own["lr"] = float(own.pop("initial_lr", group["lr"]))
        described.append(own)
    return described
