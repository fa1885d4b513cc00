"""The result of a check (prediction, observation, verdict), and the statements by name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.results import Result

NOT_APPLICABLE = "not applicable"
RELATIONS = ("=", "<=", ">=")


@dataclass(frozen=True, kw_only=True, repr=False)
class Check(Result):
    """One statement of the theory, tried on one problem.

    The verdict follows from the numbers: with `=`, `|observed - predicted| <= tolerance max(|observed|, |predicted|)`;
    with `<=` and `>=` the same slack is given to the inequality. Make one with `Check.compare` or
    `Check.not_applicable`; then `holds` cannot contradict the numbers beside it.

    Attributes:
        statement: the statement in words, one sentence.
        source: its name in the paper or number in the theory, `"Theorem 4 (T7)"`; see `theory.check.Source`.
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
    ) -> Self:
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
        numbers: dict[str, Any] = {"predicted": float(predicted), "observed": float(observed), "tolerance": tolerance}
        return cls(statement=statement, source=str(source), holds=holds, relation=relation, **numbers, **more)

    @classmethod
    def not_applicable(cls, statement: str, source: str, reason: str, **more: Any) -> Self:
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
        words, numbers = ("source", "statement", "verdict", "holds"), ("predicted", "relation", "observed", "tolerance")
        return [{name: getattr(self, name) for name in (*words, *numbers, "reason")}]


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
        counts = Counter(check.holds for check in self.checks)
        line = f"{counts[True]} hold, {counts[False]} fail, {counts[None]} not applicable"
        return line if self.stop == "done" else f"{line}; {self.stop}"

    def __str__(self) -> str:
        """A line for every check, and the counts."""
        return "\n".join([*map(str, self.checks), self._line()])

    def records(self) -> list[dict[str, Any]]:
        """One row per check."""
        return [row for check in self.checks for row in check.records()]


class Source(StrEnum):
    """A statement of Lange, Helfrich and Ye 2022, then one of this project's; its value is what tables print.

    Attributes:
        names: every name under which it can be asked for; one T-number may cover several statements.
        page: where the paper has it, empty where it does not.

    Example:
        >>> print(Source.THEOREM_4, "|", Source.THEOREM_4.page, "|", Source.T10)
        Theorem 4 (T7) | p. 9, 29 | T10
    """

    names: tuple[str, ...]
    page: str

    def __new__(cls, name: str, number: str = "", page: str = "", *also: str) -> Source:
        made = str.__new__(cls, f"{name} ({number})" if number else name)
        made._value_ = str.__str__(made)
        made.names, made.page = tuple(one for one in (name, number, *also) if one), page
        return made

    THEOREM_1 = "Theorem 1", "T14", "p. 7, 27"
    PROP_2 = "Prop. 2", "T1", "p. 7"
    THEOREM_3 = "Theorem 3", "T2", "p. 6, 9", "eq. 8"
    THEOREM_4 = "Theorem 4", "T7", "p. 9, 29"
    PROP_5 = "Prop. 5", "T8", "p. 11"
    ALGORITHM_2 = "Algorithm 2", "T3", "p. 11, 19", "Algorithm 3"
    PROP_6 = "Prop. 6", "", "p. 11-12"
    PROP_7 = "Prop. 7", "T9", "p. 13"
    PROP_9 = "Prop. 9", "T1", "p. 16", "Lemma 8"
    PROP_10 = "Prop. 10", "T6", "p. 17-18"
    ONE_EXAMPLE = "p. 20", "", "p. 20", "one example"
    PROP_11 = "Prop. 11", "T7", "p. 34"
    T1_PRIME = ("T1'",)
    T4 = ("T4",)
    T5 = ("T5",)
    T6 = ("T6",)
    T7 = ("T7",)
    T8 = ("T8",)
    T9 = ("T9",)
    T10 = ("T10",)
    T11 = ("T11",)
    T12 = ("T12",)
    T13 = ("T13",)
    T14 = "T14", "", "p. 5", "eq. 5-6"
    T15 = ("T15",)
    T16 = ("T16",)


def named(names: Sequence[str]) -> frozenset[Source]:
    """The statements with these names, in any spelling: `"Prop. 10"`, `"proposition 10"` and `"prop10"` are one.

    Args:
        names: names of the paper's, or T-numbers; a T-number means every statement under it.

    Returns:
        The sources.

    Raises:
        InvalidInputError: an unknown name, or none.

    Example:
        >>> sorted(map(str, named(["T7", "theorem 1"])))
        ['Prop. 11 (T7)', 'T7', 'Theorem 1 (T14)', 'Theorem 4 (T7)']
    """
    found = {name: frozenset(s for s in Source if _plain(name) in map(_plain, (s, *s.names))) for name in names}
    unknown = [name for name, sources in found.items() if not sources]
    if unknown or not found:
        raise InvalidInputError(f"only: no statement {', '.join(unknown) or 'named'}; there are: {', '.join(Source)}")
    return frozenset().union(*found.values())


def _plain(name: str) -> str:
    short = re.sub(r"[\s.()_-]", "", name.lower())
    return re.sub("^(proposition|thm)", lambda found: {"thm": "theorem"}.get(found[0], "prop"), short)
