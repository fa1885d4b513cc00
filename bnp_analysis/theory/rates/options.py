"""What a rate check does beyond its arguments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.theory.rates import formulas

METHODS = {"gd": "gradient descent", "heavy_ball": "heavy ball", "bnp": "BNP with running statistics"}


class NotPredictable(Exception):
    """Why there is no prediction, or no observation."""


@dataclass(frozen=True)
class RateOptions:
    """What a rate check does beyond its arguments.

    Attributes:
        momentum: of heavy ball, `"optimal"` or `0 <= beta < 1`.
        rho: weight of the past in running statistics.
        weight_decay: of the optimizer; anything but 0 makes the statement not applicable.
        tolerance: relative, of `-1/log r`.
        perturbation: of the minimizer, times `|z|/kappa*`; made smaller as needed.
        max_iterations: of all runs together.
        max_parameters: a dense Hessian is diagonalized up to this size.

    Example:
        >>> RateOptions(rho=0.9).tolerance
        0.03
    """

    momentum: float | str = "optimal"
    rho: float = 0.99
    weight_decay: float = 0.0
    tolerance: float = 0.03
    perturbation: float = 0.1
    max_iterations: int = 400_000
    max_parameters: int = 2000

    def __post_init__(self) -> None:
        if isinstance(self.momentum, str) and self.momentum != "optimal":
            raise InvalidInputError(f"momentum must be 'optimal' or a number in [0, 1), got {self.momentum!r}")
        if not isinstance(self.momentum, str):
            formulas.check_momentum(self.momentum)
        if not 0 <= self.rho < 1:
            raise InvalidInputError(f"rho must be in [0, 1), got {self.rho}")
        if not min(self.tolerance, self.perturbation, self.max_iterations, self.max_parameters) > 0:
            raise InvalidInputError("tolerance, perturbation and the limits must be positive")

    def as_settings(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)
