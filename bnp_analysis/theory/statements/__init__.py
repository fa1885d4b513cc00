"""The checks of all statements for one risk, in a fixed order; an interruption keeps the finished ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from bnp_analysis.linalg import Preconditioner
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.theory.check import Check, CheckTable, Source, named

# Each module registers its statements when it is imported.
from bnp_analysis.theory.statements import (  # noqa: F401
    conditioning,
    layers,
    normalization,
    rates,
    spectra,
    symmetry,
)
from bnp_analysis.theory.statements.setting import REGISTRY, Problem, Statement

#: The paper's statements in its order, then this project's.
STATEMENTS: tuple[Statement, ...] = tuple(REGISTRY[source] for source in Source)


@gated
def check_theory(
    risk: EmpiricalRisk,
    *,
    preconditioner: Preconditioner | None = None,
    only: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = torch.float64,
    progress: Progress = False,
    report: Callable[[Check], None] | None = None,
    time_limit: float | None = None,
) -> CheckTable:
    """Try every statement of the paper and of this project's theory on a network: prediction, observation, verdict.

    Each statement verifies its hypotheses first, and is *not applicable*, with the reason, where they fail. A verdict
    compares two computations that share as little as possible: a matrix and its formula, a network and the network
    written in other variables, a bound and the quantity it bounds.

    Args:
        risk: the empirical risk.
        preconditioner: over `risk.space`; default the undamped BNP one. Statements about BNP itself use their own.
        only: the statements wanted by the paper's names or by T-numbers, such as `["Theorem 4", "Prop. 10", "T11"]`; a
            T-number means all statements under it. Default all; `theory.check.Source` has the names.
        seed: of random choices.
        dtype: in which to measure; None for the risk's own (in float32 nothing applies).
        progress: True draws a bar, a callable gets `(done, total)` statements.
        report: gets every check when it is made.
        time_limit: seconds after which no further statement is begun.

    Returns:
        A `CheckTable`; Ctrl-C and the time limit leave the checks made so far, `stop` says so.

    Raises:
        InvalidInputError: an unknown name.

    Source: Lange, Helfrich and Ye 2022, Theorem 1 to Prop. 11; T1-T16.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x = torch.rand(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> model = bnp.models.mlp([4, 3, 2], dtype=torch.float64)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, torch.arange(30) % 2))
        >>> bnp.check_theory(risk, only=["Prop. 2"]).holds
        True
    """
    chosen = None if only is None else named(only)
    wanted = [one for one in STATEMENTS if chosen is None or one.source in chosen]
    risk.require_loss_of_outputs("what the theory speaks of")
    began = time.perf_counter()
    if dtype is not None:
        risk = risk.to(dtype, "cpu")
        preconditioner = None if preconditioner is None else preconditioner.to(dtype, "cpu")
    problem = Problem(risk, preconditioner, seed=seed)
    checks: list[Check] = []
    stop = "done"

    def from_here(i: int) -> str:
        return ", ".join(one.source for one in wanted[i:])

    with reporting(progress, len(wanted), "statements") as update:
        try:
            for i, one in enumerate(wanted):
                if time_limit is not None and time.perf_counter() - began > time_limit:
                    stop = f"stopped after {time_limit:g} s; not tried: {from_here(i)}"
                    break
                for check in one.run(problem):
                    checks.append(check)
                    if report is not None:
                        report(check)
                update(i + 1)
        except KeyboardInterrupt:
            stop = f"interrupted in {one.source}; not finished: {from_here(i)}"
    return CheckTable(
        checks=tuple(checks),
        stop=stop,
        settings={
            "only": None if only is None else list(only),
            "preconditioner": getattr(preconditioner, "settings", {}),
            "dtype": str(risk.space.dtype),
            "parameters": risk.space.dim,
            "n": risk.batches.total,
        },
        engine=risk.provenance,
        seed=seed,
        seconds=time.perf_counter() - began,
    )
