"""Finished runs on disk, one JSON line each, found by a hash of their settings; and the processes that make them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.experiment import Experiment, run_experiment
from bnp_analysis.training.run import SIGNALS, plain

REFUSED = "refused"  # the method cannot run like this, batch normalization on single examples for one
_VERSION = 1  # of what a record holds; another one is computed anew

Record = dict[str, Any]


def key_of(experiment: Experiment) -> str:
    """A hash of everything that decides the run.

    Example:
        >>> key_of(Experiment()) == key_of(Experiment(lr=0.1)), key_of(Experiment()) == key_of(Experiment(lr=0.2))
        (True, False)
    """
    text = json.dumps([_VERSION, experiment.settings()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The records of runs: kept in a file as they come, so that a comparison goes on where it was stopped.

    Args:
        path: of JSON lines, or None to keep nothing. A last line that a killed process left unfinished is cut off.

    Raises:
        InvalidInputError: a line in the middle that is no record.

    Example:
        >>> store = Store(None)
        >>> store.add(Experiment(), {"stopped": "finished"}); store.get(Experiment())["stopped"]
        'finished'
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._records: dict[str, Record] = {}
        if self._path is None or not self._path.exists():
            return
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInputError(
                    f"{self._path}, line {number}, is no record of a run ({error}): delete it, or give another file"
                ) from error
        if len(whole) < len(raw):
            with open(self._path, "r+b") as file:
                file.truncate(len(whole))

    def get(self, experiment: Experiment) -> Record | None:
        """The record of a run, or None."""
        return self._records.get(key_of(experiment))

    def add(self, experiment: Experiment, record: Record) -> None:
        """Keep a record."""
        key = key_of(experiment)
        whole = plain({"key": key, "experiment": experiment.settings()} | record)
        self._records[key] = whole
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.write(json.dumps(whole, allow_nan=False).encode() + b"\n")


def run_record(experiment: Experiment, data_dir: str | None = None) -> Record:
    """Run an experiment on one thread and say what came out; a refusal is an outcome too."""
    with one_thread():
        try:
            run = run_experiment(experiment, data_dir=data_dir)
        except InvalidInputError as error:
            return {"stopped": REFUSED, "message": str(error), "epochs": [], "seconds": 0.0, "steps": 0}
    return {
        "stopped": run.stopped,
        "message": run.message,
        "epochs": run.records(),
        "seconds": run.seconds,
        "steps": len(run.loss),
        "versions": dict(run.versions),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread: sums add up in the same order, and processes do not compete."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_all(
    experiments: Sequence[Experiment],
    store: Store,
    workers: int,
    data_dir: str | None,
    done: Callable[[], None],
) -> list[Record]:
    """The records of experiments, from the store or computed, in order.

    Raises:
        KeyboardInterrupt: a run was stopped by a signal; what is finished is in the store.
    """
    missing = list({key_of(e): e for e in experiments if store.get(e) is None}.values())
    for _ in range(len(experiments) - len(missing)):
        done()

    def keep(experiment: Experiment, record: Record) -> None:
        if record["stopped"] in SIGNALS:
            raise KeyboardInterrupt(record["message"])
        store.add(experiment, record)
        done()

    if workers == 1:
        for experiment in missing:
            keep(experiment, run_record(experiment, data_dir))
    elif missing:
        with fresh_processes(min(workers, len(missing))) as pool:
            futures = {pool.submit(run_record, experiment, data_dir): experiment for experiment in missing}
            try:
                for future in as_completed(futures):
                    keep(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [record for e in experiments if (record := store.get(e)) is not None]


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """Processes that start from nothing: a forked one would inherit torch's threads in an unknown state."""
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))
