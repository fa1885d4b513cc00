"""Methods compared fairly: every one at its own best learning rate, over several seeds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.results import Result, plain
from bnp_analysis.runtime.files import require_output, writing
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.training.experiment import Experiment, load, run_experiment
from bnp_analysis.training.run import DIVERGED, FINISHED, SIGNALS
from paper_figures.cost import fresh_processes, measure_cost, one_thread

Method = Mapping[str, Any]
REFUSED = "refused"  # the method cannot run like this, batch normalization on single examples for one
_VERSION = 1  # of what a record holds; another one is computed anew

Record = dict[str, Any]

#: What is compared by default: changes of an `Experiment`, by name.
METHODS: Mapping[str, Method] = {
    "vanilla": {},
    "BN": {"norm": "batch"},
    "LN": {"norm": "layer"},
    "GN": {"norm": "group"},
    "renorm": {"norm": "renorm"},
    "BNP": {"preconditioner": "bnp"},
    "BNP+GN": {"norm": "group", "preconditioner": "bnp"},
}
#: Learning rates searched by default, half a decade apart.
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class MethodComparison(Result):
    """Methods at their own best learning rates: final metrics over the seeds, and the cost of a step.

    Args:
        rows: one dict per method: `method`; `lr`, its best rate, None where none worked; `lr_at_edge`, whether it is
            the smallest or largest searched, so that a better one may lie outside; `seeds` finished; `diverged`;
            mean, sample standard deviation, smallest and largest of `accuracy`, mean and deviation of `eval_loss` and
            `train_loss`; `seconds` of training (beside other runs, if there were several workers); `step_ms`,
            `step_ratio` over the first method, `peak_mb`, measured alone; `note`.
        search: one dict per run of the search: `method`, `lr`, `stopped`, `accuracy`, `eval_loss` on held-out examples.
        curves: one dict per epoch of each final run: `method`, `seed`, `lr`, `epoch`, `seconds` and the metrics.
    """

    rows: tuple[Mapping[str, Any], ...]
    search: tuple[Mapping[str, Any], ...]
    curves: tuple[Mapping[str, Any], ...]

    def summary(self) -> str:
        """One line: the methods, best first."""
        able = [row for row in self.rows if row.get("accuracy") is not None]
        ranked = sorted(able, key=lambda row: -float(row["accuracy"]))
        return "accuracy: " + ", ".join(f"{row['method']} {100 * row['accuracy']:.2f} %" for row in ranked)

    def records(self) -> list[dict[str, Any]]:
        """One row per method."""
        return [dict(row) for row in self.rows]


def compare_methods(
    base: Experiment,
    methods: Mapping[str, Method] | None = None,
    *,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = (0, 1, 2),
    search_epochs: int | None = None,
    holdout: float = 1 / 6,
    results: str | os.PathLike[str] | None = None,
    workers: int = 1,
    cost: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
    progress: Progress = False,
) -> MethodComparison:
    """Compare methods, each at the learning rate of the grid that is best for it.

    First each method is trained with each rate, one seed and few epochs, and judged on training examples that are
    held out: the test set takes no part in the choice. Then it is trained on all training examples at its best rate
    with several seeds, and evaluated on the test set. At last steps are timed, when no other run is under way.

    Args:
        base: what the methods share; its seed is that of the search.
        methods: name -> changes of `base`; default `METHODS`.
        rates: the grid.
        seeds: of the final runs, at least 3 for a spread that means something.
        search_epochs: of a search run; by default a third of the epochs, at least 1.
        holdout: part of the training examples that judges the search.
        results: file of JSON lines, one per finished run. Runs that it holds are not repeated, so that a stopped
            comparison goes on, and a larger one uses a smaller one.
        workers: processes, each with one thread; 1 runs everything in this one. A script that asks for more keeps
            what it does under `if __name__ == "__main__":`, since they import it anew.
        cost: whether to measure time and memory of a step.
        data_dir: where the files of the data set are.
        progress: True draws a bar, a callable gets `(done, total)` runs.

    Returns:
        A `MethodComparison`.

    Raises:
        InvalidInputError: empty grids, unknown fields or names.
        KeyboardInterrupt: stopped; finished runs are in `results`.

    Example:
        >>> base = Experiment(samples=120, hidden=(8,), epochs=1)
        >>> methods = {"vanilla": {}, "BNP": {"preconditioner": "bnp"}}
        >>> found = compare_methods(base, methods, rates=[0.1, 0.3], seeds=[0, 1, 2], cost=False)
        >>> [(row["method"], row["seeds"], row["lr"] in (0.1, 0.3)) for row in found.records()]
        [('vanilla', 3, True), ('BNP', 3, True)]
    """
    began = time.perf_counter()
    methods = METHODS if methods is None else methods
    if not methods or not rates or not seeds or workers < 1 or not 0 < holdout < 1:
        raise InvalidInputError("at least one method, rate, seed and worker, and 0 < holdout < 1, are needed")
    budget = max(1, base.epochs // 3) if search_epochs is None else search_epochs
    tries = {name: [_changed(base, change, lr=lr) for lr in rates] for name, change in methods.items()}
    folder = None if data_dir is None else os.fspath(data_dir)
    store = Store(results)
    total = len(tries) * (len(rates) + len(seeds))
    with reporting(progress, total, "runs") as update:
        count = iter(range(1, 1 + total))

        def done() -> None:
            update(next(count))

        short = [replace(e, holdout=holdout, epochs=budget) for own in tries.values() for e in own]
        searched = _by_method(tries, run_all(short, store, workers, folder, done), len(rates))
        best = {name: _best(records) for name, records in searched.items()}
        final = {n: [replace(tries[n][i], seed=s) for s in seeds] for n, i in best.items() if i is not None}
        runs = run_all([e for own in final.values() for e in own], store, workers, folder, done)
    finished = _by_method(final, runs, len(seeds))
    costs = _costs(tries, best, folder) if cost else {}
    settings: dict[str, Any] = {
        "base": base.settings(),
        "methods": {name: dict(change) for name, change in methods.items()},
    }
    settings |= {"rates": list(rates), "seeds": list(seeds), "search_epochs": budget, "holdout": holdout}
    return MethodComparison(
        rows=tuple(_row(n, rates, best[n], searched[n], finished.get(n, []), costs.get(n, {})) for n in tries),
        search=_search_rows(searched, rates),
        curves=_curves(final, finished),
        settings=settings | {"workers": workers},
        seed=base.seed,
        seconds=time.perf_counter() - began,
    )


def _search_rows(searched: Mapping[str, list[Record]], rates: Sequence[float]) -> tuple[dict[str, Any], ...]:
    """One row per run of the search."""
    return tuple(
        {"method": name, "lr": lr, "stopped": record["stopped"]} | _final(record)
        for name, records in searched.items()
        for lr, record in zip(rates, records, strict=True)
    )


def _curves(final: Mapping[str, list[Experiment]], finished: Mapping[str, list[Record]]) -> tuple[dict[str, Any], ...]:
    """One row per epoch of the final runs."""
    return tuple(
        {"method": name, "seed": e.seed, "lr": e.lr} | epoch
        for name, own in final.items()
        for e, record in zip(own, finished[name], strict=True)
        for epoch in record["epochs"]
    )


def _changed(base: Experiment, change: Method, **more: Any) -> Experiment:
    try:
        return replace(base, **{**change, **more})
    except TypeError as error:
        raise InvalidInputError(f"a method changes the fields of Experiment: {error}") from error


def _by_method(names: Mapping[str, Any], records: list[Record], each: int) -> dict[str, list[Record]]:
    return {name: records[i * each : (i + 1) * each] for i, name in enumerate(names)}


def _final(record: Record) -> dict[str, float | None]:
    """The metrics of the last epoch of a finished run."""
    row = record["epochs"][-1] if record["stopped"] == FINISHED and record["epochs"] else {}
    return {name: row.get(name) for name in ("accuracy", "eval_loss", "train_loss")}


def _best(records: list[Record]) -> int | None:
    """Which run of a search was best: by held-out accuracy, then by held-out loss; None where none finished."""
    scores = []
    for i, record in enumerate(records):
        found = _final(record)
        if found["accuracy"] is not None and isinstance(found["eval_loss"], float):
            scores.append((-found["accuracy"], found["eval_loss"], i))
    return min(scores)[2] if scores else None


def _costs(
    tries: Mapping[str, list[Experiment]], best: Mapping[str, int | None], data_dir: str | None
) -> dict[str, dict[str, float]]:
    able = {name: tries[name][i] for name, i in best.items() if i is not None}
    if not able:
        return {}
    examples = load(next(iter(able.values())), data_dir)
    found = measure_cost(list(able.values()), examples.input_shape, examples.num_classes, memory=True)
    first = found[0].get("step_ms", math.nan)
    ratios = [own | {"step_ratio": own["step_ms"] / first} if own else own for own in found]
    return dict(zip(able, ratios, strict=True))


def _row(
    name: str,
    rates: Sequence[float],
    best: int | None,
    searched: list[Record],
    final: list[Record],
    cost: Mapping[str, float],
) -> dict[str, Any]:
    """The line of a method in the table."""
    row: dict[str, Any] = {"method": name, "lr": None, "lr_at_edge": None, "seeds": 0, "diverged": 0}
    if best is None:
        refused = [record["message"] for record in searched if record["stopped"] == REFUSED]
        return row | {"note": refused[0] if refused else "diverged at every learning rate"}
    lr = rates[best]
    row |= {"lr": lr, "lr_at_edge": len(rates) > 1 and lr in (min(rates), max(rates))}
    row["diverged"] = sum(record["stopped"] == DIVERGED for record in final)
    done = [_final(record) for record in final if record["stopped"] == FINISHED]
    row["seeds"] = len(done)
    for metric in ("accuracy", "eval_loss", "train_loss"):
        values = [float(found[metric] or 0.0) for found in done]
        row[metric] = statistics.fmean(values) if values else None
        row[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        if metric == "accuracy":
            row |= {"accuracy_min": min(values, default=None), "accuracy_max": max(values, default=None)}
    row["seconds"] = statistics.fmean([record["seconds"] for record in final])
    return row | dict(cost) | {"note": ""}


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
        if self._path is not None:
            require_output(self._path, "results")
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
            with writing(self._path), open(self._path, "r+b") as file:
                file.truncate(len(whole))

    def get(self, experiment: Experiment) -> Record | None:
        """The record of a run, or None."""
        return self._records.get(key_of(experiment))

    def add(self, experiment: Experiment, record: Record) -> None:
        """Keep a record."""
        key = key_of(experiment)
        whole = plain({"key": key, "experiment": experiment.settings()} | record, strict=True)
        self._records[key] = whole
        if self._path is not None:
            with writing(self._path):
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
