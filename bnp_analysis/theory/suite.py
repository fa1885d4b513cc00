"""All statements over one risk: which there are, in which order, and what an interruption leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from bnp_analysis.linalg import Preconditioner
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.theory.check import Check, CheckTable
from bnp_analysis.theory.sources import named
from bnp_analysis.theory.statements.blocks import check_blocks
from bnp_analysis.theory.statements.conditioning import (
    check_centering,
    check_conditioning,
    check_scale,
    check_through_curvature,
)
from bnp_analysis.theory.statements.coordinates import check_coordinates, check_update, check_without_bias
from bnp_analysis.theory.statements.cost import check_cost
from bnp_analysis.theory.statements.floating_point import check_floating_point
from bnp_analysis.theory.statements.layer_curvature import (
    check_convolution_blocks,
    check_dense_blocks,
    check_hessian_is_gauss_newton,
)
from bnp_analysis.theory.statements.normalization import check_batch_norm, check_one_step
from bnp_analysis.theory.statements.one_example import check_one_example
from bnp_analysis.theory.statements.orbits import check_orbits, check_output_scaling
from bnp_analysis.theory.statements.random_matrices import check_independent_entries
from bnp_analysis.theory.statements.rates import check_descent, check_every_step, check_preconditioned_descent
from bnp_analysis.theory.statements.setting import Problem, Statement
from bnp_analysis.theory.statements.statistics import (
    check_padded_means,
    check_patch_statistics,
    check_running_statistics,
)
from bnp_analysis.theory.statements.symmetry import check_null_directions

#: The paper's statements in its order, then this project's.
STATEMENTS: tuple[Statement, ...] = (
    check_every_step,
    check_dense_blocks,
    check_coordinates,
    check_centering,
    check_independent_entries,
    check_update,
    check_cost,
    check_one_step,
    check_convolution_blocks,
    check_padded_means,
    check_one_example,
    check_through_curvature,
    check_hessian_is_gauss_newton,
    check_running_statistics,
    check_without_bias,
    check_patch_statistics,
    check_conditioning,
    check_scale,
    check_batch_norm,
    check_output_scaling,
    check_null_directions,
    check_orbits,
    check_floating_point,
    check_descent,
    check_preconditioned_descent,
    check_blocks,
)


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
            T-number means all statements under it. Default all; `theory.sources.Source` has the names.
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
    wanted = _wanted(only)
    risk.require_loss_of_outputs("what the theory speaks of")
    began = time.perf_counter()
    if dtype is not None:
        risk = risk.to(dtype, "cpu")
        preconditioner = None if preconditioner is None else preconditioner.to(dtype, "cpu")
    problem = Problem(risk, preconditioner, seed=seed)
    checks: list[Check] = []
    stop = "done"
    with reporting(progress, len(wanted), "statements") as update:
        try:
            for i, one in enumerate(wanted):
                if time_limit is not None and time.perf_counter() - began > time_limit:
                    stop = f"stopped after {time_limit:g} s; not tried: {_sources(wanted[i:])}"
                    break
                for check in one.run(problem):
                    checks.append(check)
                    if report is not None:
                        report(check)
                update(i + 1)
        except KeyboardInterrupt:
            stop = f"interrupted in {one.source}; not finished: {_sources(wanted[i:])}"
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


def _wanted(only: Sequence[str] | None) -> list[Statement]:
    chosen = None if only is None else named(only)
    return [one for one in STATEMENTS if chosen is None or one.source in chosen]


def _sources(statements: Sequence[Statement]) -> str:
    return ", ".join(one.source for one in statements)
