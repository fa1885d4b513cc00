"""Which statements there are: the paper's names first, this project's T-numbers second."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from bnp_analysis.errors import InvalidInputError


class Source(StrEnum):
    """A statement of Lange, Helfrich and Ye 2022, or one of this project's; its value is what tables print.

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

    T14 = "T14", "", "p. 5", "eq. 5-6"
    THEOREM_1 = "Theorem 1", "T14", "p. 7, 27"
    PROP_2 = "Prop. 2", "T1", "p. 7"
    T1_PRIME = ("T1'",)
    THEOREM_3 = "Theorem 3", "T2", "p. 6, 9", "eq. 8"
    THEOREM_4 = "Theorem 4", "T7", "p. 9, 29"
    T7 = ("T7",)
    PROP_5 = "Prop. 5", "T8", "p. 11"
    T8 = ("T8",)
    ALGORITHM_2 = "Algorithm 2", "T3", "p. 11, 19", "Algorithm 3"
    T4 = ("T4",)
    T5 = ("T5",)
    PROP_6 = "Prop. 6", "", "p. 11-12"
    PROP_7 = "Prop. 7", "T9", "p. 13"
    T9 = ("T9",)
    PROP_9 = "Prop. 9", "T1", "p. 16", "Lemma 8"
    PROP_10 = "Prop. 10", "T6", "p. 17-18"
    T6 = ("T6",)
    PROP_11 = "Prop. 11", "T7", "p. 34"
    ONE_EXAMPLE = "p. 20", "", "p. 20", "one example"
    T10 = ("T10",)
    T11 = ("T11",)
    T12 = ("T12",)
    T13 = ("T13",)
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
        raise InvalidInputError(f"no statement {', '.join(unknown) or 'named'}; there are: {', '.join(Source)}")
    return frozenset().union(*found.values())


def _plain(name: str) -> str:
    short = re.sub(r"[\s.()_-]", "", name.lower())
    return re.sub("^(proposition|thm)", lambda found: {"thm": "theorem"}.get(found[0], "prop"), short)
