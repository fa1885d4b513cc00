"""What a training run leaves behind: its result, and its log while it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from bnp_analysis.results import Result, plain
from bnp_analysis.runtime.files import writing

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
