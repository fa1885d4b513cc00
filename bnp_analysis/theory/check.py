"""What a checked statement leaves: prediction, observation, verdict, and the hypotheses under which it speaks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.results import Result

NOT_APPLICABLE = "not applicable"
RELATIONS = {"=": "equals", "<=": "is at most", ">=": "is at least"}


@dataclass(frozen=True, kw_only=True, repr=False)
class Check(Result):
    """One statement of the theory, tried on one problem.

    The verdict follows from the numbers: with `=`, `|observed - predicted| <= tolerance max(|observed|, |predicted|)`;
    with `<=` and `>=` the same slack is given to the inequality. Make one with `Check.compare` or
    `Check.not_applicable`; then `holds` cannot contradict the numbers beside it.

    Attributes:
        statement: the statement in words, one sentence.
        source: its name in the paper or number in the theory, `"Theorem 4 (T7)"`; see `theory.sources.Source`.
        holds: True, False, or None for *not applicable*.
        predicted, observed: what is compared, NaN where not applicable.
        relation: what is claimed, `observed = predicted`, `<=` or `>=`.
        tolerance: relative.
        hypotheses: hypothesis in words -> whether it was verified here.
        reason: why the statement does not apply, or what to know about the verdict.
        details: further numbers.
    """

    statement: str
    source: str
    holds: bool | None
    predicted: float = math.nan
    observed: float = math.nan
    relation: str = "="
    tolerance: float = 0.0
    hypotheses: Mapping[str, bool] = field(default_factory=dict)
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def compare(
        cls,
        statement: str,
        source: str,
        *,
        observed: float,
        predicted: float,
        tolerance: float,
        relation: str = "=",
        **more: Any,
    ) -> Check:
        """Compare an observation with a prediction.

        Args:
            statement, source: see the class.
            observed, predicted: the numbers; NaN in either is a verdict of False, never of True.
            tolerance: relative to the larger of the two magnitudes; in front of a prediction of 0 give the scale of
                the observation with the numbers, as a ratio.
            relation: `"="`, `"<="` or `">="`.
            more: other fields of a `Check`: `hypotheses`, `reason`, `details`, `settings`, `seed`, `matvecs`, ...

        Returns:
            The check.

        Raises:
            InvalidInputError: an unknown relation or a negative tolerance.

        Example:
            >>> print(Check.compare("the rate is 1 - 1/kappa", "T14", observed=0.901, predicted=0.9, tolerance=0.01))
            T14              holds           the rate is 1 - 1/kappa: observed 0.901 = predicted 0.9 (within 0.01)
        """
        if relation not in RELATIONS or not tolerance >= 0:
            raise InvalidInputError(
                f"relation must be one of {', '.join(RELATIONS)} and the tolerance not negative, got {relation!r} and "
                f"{tolerance}"
            )
        size = max(abs(observed), abs(predicted))
        slack = tolerance * size if math.isfinite(size) else 0.0
        excess = observed - predicted if observed != predicted else 0.0
        holds = {"=": abs(excess) <= slack, "<=": excess <= slack, ">=": -excess <= slack}[relation]
        return cls(
            statement=statement,
            source=str(source),
            holds=holds,
            predicted=float(predicted),
            observed=float(observed),
            relation=relation,
            tolerance=tolerance,
            **more,
        )

    @classmethod
    def not_applicable(cls, statement: str, source: str, reason: str, **more: Any) -> Check:
        """A statement whose hypotheses fail here, or could not be verified.

        Example:
            >>> print(Check.not_applicable("gradient descent contracts", "T14", "the loss has no minimizer"))
            T14              not applicable  gradient descent contracts: the loss has no minimizer
        """
        if not reason:
            raise InvalidInputError("a check that does not apply needs a reason")
        return cls(statement=statement, source=str(source), holds=None, reason=reason, **more)

    @property
    def verdict(self) -> str:
        """`"holds"`, `"fails"` or `"not applicable"`."""
        return NOT_APPLICABLE if self.holds is None else "holds" if self.holds else "fails"

    def summary(self) -> str:
        """One line."""
        head = f"{self.source:<16} {self.verdict:<15} {self.statement}: "
        if self.holds is None:
            return head + self.reason
        sign = self.relation if self.holds else {"=": "!=", "<=": ">", ">=": "<"}[self.relation]
        numbers = f"observed {self.observed:.6g} {sign} predicted {self.predicted:.6g} (within {self.tolerance:g})"
        return head + numbers + (f"; {self.reason}" if self.reason else "")

    def records(self) -> list[dict[str, Any]]:
        """The check as a row of a table."""
        return [
            {
                "source": self.source,
                "statement": self.statement,
                "verdict": self.verdict,
                "predicted": self.predicted,
                "observed": self.observed,
                "tolerance": self.tolerance,
                "reason": self.reason,
            }
        ]


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckTable(Result):
    """Checks of one problem, in the order in which they ran.

    Attributes:
        checks: the checks.
        stop: why the run ended, `"done"` or what interrupted it.
    """

    checks: tuple[Check, ...]
    stop: str = "done"

    @property
    def holds(self) -> bool:
        """Whether every check that applies holds, and at least one applies."""
        verdicts = [check.holds for check in self.checks if check.holds is not None]
        return bool(verdicts) and all(verdicts)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that fail."""
        return tuple(check for check in self.checks if check.holds is False)

    def summary(self) -> str:
        """How many hold, fail, do not apply."""
        counts = {True: 0, False: 0, None: 0}
        for check in self.checks:
            counts[check.holds] += 1
        line = f"{counts[True]} hold, {counts[False]} fail, {counts[None]} not applicable"
        return line if self.stop == "done" else f"{line}; {self.stop}"

    def records(self) -> list[dict[str, Any]]:
        """One row per check."""
        return [row for check in self.checks for row in check.records()]
