"""What one example leaves of a layer's inputs (the paper's remark on p. 20)."""

from __future__ import annotations

from collections.abc import Iterator

from bnp_analysis.network import Layer, layer_rows
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.conditioning import singular
from bnp_analysis.theory.statements.reference import block_of, extended, first_unit
from bnp_analysis.theory.statements.rewriting import first_examples, rewritten
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, each_layer, label, statement

_DENSE = "with one example H^ of a dense layer has one row: BNP moves its norm and no condition number"
_CONVOLUTION = "with one example H^ of a convolution keeps a row per position"


@statement(Source.ONE_EXAMPLE, _DENSE)
def check_one_example(problem: Problem) -> Iterator[Check]:
    """The remark on one example: the first of the data, with the preconditioner of all of them."""
    if problem.risk.coupled:
        raise NotApplicable("batch statistics couple the examples")
    one = Problem(rewritten(problem.risk, batches=first_examples(problem.risk, 1)), limit=problem.limit)
    if round(one.risk.batches.total) != 1:
        raise NotApplicable("the first batch cannot be cut")
    rows = layer_rows(one.risk, problem.layers)

    def dense(problem: Problem, layer: Layer) -> Iterator[Check]:
        one.require_once(layer)
        given = extended(rows[layer.name][:, 0], layer.bias is not None)
        if len(given) != 1:
            raise NotApplicable(f"a sequence: one example has {len(given)} rows")
        P = block_of(problem.bnp, layer).unit(first_unit(layer, 0)).to_dense()
        yield Check.compare(
            f"{_DENSE} [{label(layer)}]",
            Source.ONE_EXAMPLE,
            observed=max(singular(given).value, singular(given @ P).value),
            predicted=1.0,
            tolerance=1e-12,
            hypotheses={"dense": True, "one example": True},
            details={"|H^|": float(given.norm()), "|H^ P|": float((given @ P).norm())},
        )

    def convolution(problem: Problem, layer: Layer) -> Iterator[Check]:
        one.require_once(layer)
        counts: list[int] = []
        one.risk.capture(lambda name, module, args, out: counts.append(out.numel() // layer.units), [layer.name])
        given = extended(rows[layer.name][:, 0], layer.bias is not None)
        yield Check.compare(
            f"{_CONVOLUTION} [{label(layer)}]",
            Source.ONE_EXAMPLE,
            observed=float(len(given)),
            predicted=float(counts[0]),
            tolerance=0.0,
            hypotheses={"convolution": True, "one example": True},
            details={"rank of H^": singular(given).rank, "columns": given.shape[1]},
        )

    yield from each_layer(problem, _DENSE, Source.ONE_EXAMPLE, dense, dense=True)
    yield from each_layer(problem, _CONVOLUTION, Source.ONE_EXAMPLE, convolution, dense=False)
