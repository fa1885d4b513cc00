"""Published condition numbers and ranks beside certified ones: one file per source, and the registry of all.

A file holds the functions that measure and ends with its `Entry`. What an entry measures is stored by the figure
`fig14_reported`; `python -m paper_figures.gallery` writes docs/reported.md from what is stored.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
#: A reported number agrees within this relative distance of the certified interval, and is wrong beyond the second.
DIGITS, WIDE = 1e-6, 0.1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number, as the source has it and certified.

    Attributes:
        case: which one it is.
        printed: what the source prints; NaN where it prints none for this case.
        reported: what the routine of the source gives here, in its precision.
        lower, upper: the certified interval.
        exact: the independent check, computed another way in exact arithmetic or with 50 digits; NaN without one.
        quantity: `"kappa"` or `"rank"`.
        agrees: whether `reported` lies in the certified interval up to `DIGITS`, or misses it by more than `WIDE`; None
            where that depends on the BLAS and is not claimed.
    """

    case: str
    reported: float
    lower: float
    upper: float
    exact: float = math.nan
    printed: float = math.nan
    quantity: str = "kappa"
    agrees: bool | None = True


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One source of numbers.

    Attributes:
        title: of what.
        source: publication with page or section.
        setting: what is measured, and where it departs from the source.
        naive, certified, check: how the source got its number, how this package does, how the result is checked.
        why: what differs, and why.
        presets: settings by preset, plain data.
        measure: the rows from the settings.
    """

    title: str
    source: str
    setting: str
    naive: str
    certified: str
    check: str
    why: str
    presets: Mapping[str, Settings]
    measure: Callable[[Settings], Iterable[Row]]


def entries() -> dict[str, Entry]:
    """All entries by the names of their files."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}").ENTRY for name in names}
