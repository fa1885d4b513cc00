"""Published condition numbers and ranks beside certified ones: one file per source, and the registry of all.

A file contains the functions that measure, and ends with its `Entry`. The figure `fig14_reported` runs and stores all
measurements; `python -m paper_figures.gallery` writes docs/reported.md from the stored data.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
#: A reported number agrees within the first relative distance of the certified interval, is wrong beyond the second.
DIGITS, WIDE = 1e-6, 0.1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number, as the source has it and certified.

    Attributes:
        case: name of the number.
        printed: what the source prints; NaN where it prints none for this case.
        reported: what the routine of the source gives here, in its precision.
        lower, upper: the certified interval.
        exact: an independent check in exact arithmetic or with 50 digits; NaN without one.
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
        title: heading of the section.
        source: publication with page or section.
        setting: what is measured, and how the setting differs from the source's.
        naive, certified, check: method of the source, method of this package, independent check.
        why: which numbers differ, and why.
        presets: settings of each preset, plain data.
        measure: computes the rows from the settings.
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
