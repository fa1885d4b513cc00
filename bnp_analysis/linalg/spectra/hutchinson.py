"""Stochastic traces."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.scale import exponent, in_floats, scaled
from bnp_analysis.linalg.spectra.checks import measured, products_known_to, provenance
from bnp_analysis.linalg.spectra.quadrature import standard_error
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.runtime.random import generator, rademacher


@dataclass(frozen=True, kw_only=True, repr=False)
class Trace(Result):
    """A stochastic trace with its standard error, and what its products round."""

    value: float
    error: float
    dim: int

    def summary(self) -> str:
        """The trace and its error."""
        cost = f"{self.matvecs} products{products_known_to(self)}"
        return f"trace = {self.value:.6g} +- {self.error:.2g} (standard error), {cost}"


@full_float32
def trace(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    probes: int = 32,
    seed: int = 0,
    progress: Progress = False,
) -> Trace:
    """The trace of `P^T A P` by Hutchinson's estimator, `mean(v.Av)` over random signs `v`.

    Args:
        A: symmetric operator on `R^n`.
        preconditioner: `P`; the trace of `P^T A P`.
        probes: number of random vectors, at least 2.
        seed: of the probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Trace` with the standard error over probes and the rounding `sqrt(n) eps |A v|` of products.

    Raises:
        InvalidInputError: fewer than two probes; NonFiniteError: a product with NaN or infinity.

    Source: Hutchinson 1990.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> bnp.trace(bnp.DenseOperator(torch.eye(7, dtype=torch.float64))).value
        7.0
    """
    if probes < 2:
        raise InvalidInputError(f"an error bar needs at least two probes, got {probes}")
    began = time.perf_counter()
    operator = scaled(measured(A, preconditioner, None, seed)[0])
    g = generator(seed)
    like = torch.empty(0, dtype=operator.dtype, device=A.device)
    samples: list[float] = []
    largest = 0.0
    with reporting(progress, probes, "trace") as update:
        try:
            for i in range(probes):
                v = rademacher((A.dim,), g, like)
                image = (operator @ v).double()
                samples.append(float(v.double() @ image))
                largest = max(largest, float(image.norm()))
                if not math.isfinite(samples[-1]):
                    raise NonFiniteError(f"product {i + 1} with {operator!r} has NaN or infinite entries")
                update(i + 1)
        except KeyboardInterrupt:
            # Two finished probes are a result of their own, with an error bar.
            if len(samples) < 2:
                raise
    values = np.array(samples)
    # Each of n terms v_i (A v)_i is known to a rounding; probes do not average it away.
    rounding = operator.eps * math.sqrt(A.dim) * largest
    return Trace(
        value=in_floats(float(values.mean()), -exponent(operator), "the trace"),
        error=in_floats(math.hypot(standard_error(values), rounding), -exponent(operator), "the error of the trace"),
        dim=A.dim,
        matvecs=len(samples),
        **provenance(A, preconditioner, {"probes": probes}, seed, began),
    )
