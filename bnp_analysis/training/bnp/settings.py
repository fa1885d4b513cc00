"""The options of BNP in training, and their validation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.precondition.bnp import require_options

_CHOICES = {
    "variance": ("total", "within", "paper"),
    "init": ("corrected", "paper"),
    "statistics": ("channel", "patch"),
    "output_scale": ("none", "estimated"),
}


@dataclass(frozen=True)
class Settings:
    """How `P` is built; the meaning of each is in `BNP`."""

    rho: float = 0.99
    eps1: float = 1e-2
    eps2: float = 1e-4
    q: str | float = "auto"
    variance: str = "total"
    init: str = "corrected"
    statistics: str = "channel"
    bias_free: str = "rank-one"
    output_scale: str = "none"
    reference_rows: float | None = None
    check_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rho < 1:
            raise InvalidInputError(f"rho must lie in [0, 1), got {self.rho}")
        require_options(self.eps1, self.eps2, self.q, self.bias_free)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                exact = "; exact scales are those of bnp_preconditioner(risk, output_scale=True)"
                more = exact if name == "output_scale" else ""
                raise InvalidInputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}{more}")
        if self.reference_rows is not None and not _positive(self.reference_rows):
            raise InvalidInputError(f"reference_rows must be a positive number or None, got {self.reference_rows!r}")


def _positive(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf
