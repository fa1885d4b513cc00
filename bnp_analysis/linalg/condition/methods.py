"""Methods for condition numbers: interface, registry, cost estimates, and the choice of `auto`.

A new method is one file that ends with `register(Method(...))`, and one line that imports it in `condition/__init__`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bnp_analysis.errors import InvalidInputError, MemoryLimitError
from bnp_analysis.linalg.condition.number import Extremes, Magnitudes
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.scale import exponent, scaled
from bnp_analysis.linalg.spectra.checks import DeclaredNull
from bnp_analysis.results import Result
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import available_memory
from bnp_analysis.runtime.progress import Progress

T = TypeVar("T")
LANCZOS_STEPS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What a method is asked: the ends of the nonzero spectrum of `P^T A P`.

    Attributes:
        A: the operator.
        P: the preconditioner, None for the identity.
        null: the declared null directions of `A`, not checked yet.
        semidefinite: whether a negative eigenvalue is an error; else magnitudes are compared.
        steps: of a Krylov method, None for its default.
        failure_probability: of bounds that rest on a random start.
        count: how many of the largest magnitudes are wanted; None leaves it to the method.
        probes: random vectors for the part of a trace that is not resolved.
        least: a number that no eigenvalue lies below if `A` is semidefinite, from a regularization; 0 says nothing.
        seed, checkpoint, progress: as in `condition_number`.
    """

    A: SymmetricOperator
    P: Preconditioner | None
    null: DeclaredNull
    semidefinite: bool = True
    steps: int | None = None
    failure_probability: float = 1e-3
    count: int | None = None
    probes: int = 16
    least: float = 0.0
    seed: int = 0
    checkpoint: str | Path | None = None
    progress: Progress = False

    @property
    def krylov_steps(self) -> int:
        """`steps`, or as many as Lanczos takes unless told otherwise."""
        return LANCZOS_STEPS if self.steps is None else self.steps

    def factor(self, method: str) -> LinearOperator:
        """The factor of `A`.

        Raises:
            InvalidInputError: it has none.
        """
        if self.A.factor is None:
            raise InvalidInputError(
                f"{self.A!r} has no factor, so {method} cannot run; use method='dense' or 'lanczos', or a Gauss-Newton "
                "operator, whose factor is known"
            )
        return self.A.factor

    def scaled(self) -> Problem:
        """The same problem with powers of two times `A` and `P`, in the middle of the floats."""
        return replace(self, A=scaled(self.A), P=None if self.P is None else scaled(self.P))

    def in_units(self, ends: Extremes) -> Extremes:
        """What was found of a scaled problem, in the units of the operator that was given."""
        return ends.times_power(-exponent(self.A) - (0 if self.P is None else 2 * exponent(self.P)))


@dataclass(frozen=True)
class Price:
    """What a method would take: products with the operator (NaN: it depends on the spectrum), bytes, operations."""

    products: float
    memory: int
    flops: float

    def within(self, most: Price) -> bool:
        """Whether no part is above `most`.

        Example:
            >>> Price(10, 2**20, 1e6).within(Price(10, 2**30, 1e5))
            False
        """
        return self.products <= most.products and self.memory < most.memory and self.flops <= most.flops


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to a condition number.

    Attributes:
        name: as `method=` takes it.
        claim: what it can say, in words.
        price: what it would take, from the operator and a number of Krylov steps, without a product.
        solve: finds the ends of a spectrum.
        magnitudes: finds the largest magnitudes, or all, each with bounds that hold for its own rank, for profiles;
            None for a method that bounds no eigenvalues but the ends.
        applies: whether it can run on an operator, memory apart.
        automatic: whether `method="auto"` may take it for an operator, memory apart.
        decides: whether it finds both ends, so that it is proposed after a one-sided answer.
        indefinite: whether it can compare magnitudes.
        order: the place in lists; `auto` and proposals take the first that fits.
    """

    name: str
    claim: str
    price: Callable[[SymmetricOperator, int], Price]
    solve: Callable[[Problem], Extremes]
    magnitudes: Callable[[Problem], Magnitudes] | None = None
    applies: Callable[[SymmetricOperator], bool] = lambda _: True
    automatic: Callable[[SymmetricOperator], bool] = lambda _: False
    decides: bool = False
    indefinite: bool = False
    order: int = 100


_REGISTERED: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method: `condition_number(A, method=name)` takes it, and `methods` lists it.

    Raises:
        InvalidInputError: the name is taken.

    Example:
        >>> dense = registered()[3]
        >>> register(dense)
        Traceback (most recent call last):
        bnp_analysis.errors.InvalidInputError: there is a method 'dense' already
    """
    if method.name in (*_REGISTERED, "auto"):
        raise InvalidInputError(f"there is a method {method.name!r} already")
    _REGISTERED[method.name] = method
    return method


def registered() -> list[Method]:
    """Every method, in order.

    Example:
        >>> [method.name for method in registered()][:3]
        ['factor-svd', 'row-gram', 'golub-kahan']
    """
    return sorted(_REGISTERED.values(), key=lambda method: method.order)


def named(name: str) -> Method:
    """The method of a name.

    Raises:
        InvalidInputError: there is none.
    """
    if name not in _REGISTERED:
        known = ", ".join(["auto", *(method.name for method in registered())])
        raise InvalidInputError(f"method must be one of {known}, got {name!r}")
    return _REGISTERED[name]


def candidates(
    A: SymmetricOperator,
    *,
    indefinite: bool = False,
    magnitudes: bool = False,
    products: float = math.inf,
    flops: float = math.inf,
) -> list[Method]:
    """The methods that `auto` tries: those that are automatic for the operator and within the limits, and the last.

    Args:
        A: symmetric operator.
        indefinite: only methods that can compare magnitudes.
        magnitudes: only methods that bound eigenvalues at every rank, for a profile.
        products, flops: that it may take; memory is what is free.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> [method.name for method in candidates(bnp.DenseOperator(torch.eye(3)))]
        ['dense', 'lanczos']
        >>> [method.name for method in candidates(bnp.DenseOperator(torch.eye(3)), magnitudes=True, flops=10)]
        ['lanczos']
    """
    most = Price(products, available_memory(A.device), flops)
    wanted = [
        method
        for method in registered()
        if method.automatic(A) and (method.indefinite or not indefinite) and (method.magnitudes or not magnitudes)
    ]
    return [method for method in wanted[:-1] if method.price(A, LANCZOS_STEPS).within(most)] + wanted[-1:]


def automatic(A: SymmetricOperator, **limits: Any) -> Method:
    """The first of the `candidates`.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> automatic(bnp.DenseOperator(torch.eye(3))).name
        'dense'
    """
    return candidates(A, **limits)[0]


def first_that_fits(methods: Sequence[Method], use: Callable[[Method], T]) -> tuple[Method, T]:
    """The first method that does not run out of memory, and what came of it; the last one's error is raised.

    What is free when a method is chosen may be taken when it begins.

    Example:
        >>> first_that_fits(registered()[:2], lambda method: method.order)[1]
        10
    """
    for method in methods[:-1]:
        with suppress(MemoryLimitError):
            return method, use(method)
    return methods[-1], use(methods[-1])


@dataclass(frozen=True, kw_only=True, repr=False)
class MethodCost(Result):
    """A method for the condition number of one operator, with its price.

    Attributes:
        method: its name.
        products: with the operator; NaN where it depends on the spectrum.
        memory: bytes.
        flops: of the dense algebra.
        applies: whether it can run here and now.
        claim: what it can say.
    """

    method: str
    products: float
    memory: int
    flops: float
    applies: bool
    claim: str

    def summary(self) -> str:
        """The method in one line."""
        products = (
            "a number of products that depends on the spectrum"
            if math.isnan(self.products)
            else f"{self.products:.0f} products"
        )
        cost = f"{products}, {self.memory / 2**30:.2g} GiB, {self.flops:.1e} flops"
        return f"{self.method:<16} {'' if self.applies else 'does not apply; '}{cost}: {self.claim}"


@gated
def methods(A: SymmetricOperator, steps: int = LANCZOS_STEPS) -> list[MethodCost]:
    """Every method for the condition number of an operator, with its cost and memory, before anything runs.

    Args:
        A: symmetric operator on `R^n`.
        steps: of Lanczos.

    Returns:
        Their costs; the first that applies among factor-svd, row-gram, dense, lanczos is what `"auto"` takes.

    Source: T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> [cost.method for cost in bnp.linalg.methods(bnp.DenseOperator(torch.eye(3))) if cost.applies]
        ['dense', 'inertia', 'inverse-lanczos', 'lanczos']
    """
    free = available_memory(A.device)
    prices = [(method, method.price(A, steps)) for method in registered()]
    return [
        MethodCost(
            method=method.name,
            **vars(price),
            applies=method.applies(A) and price.memory < free,
            claim=method.claim,
            settings={"dim": A.dim, "steps": steps},
        )
        for method, price in prices
    ]


@gated
def choose_method(A: SymmetricOperator, *, indefinite: bool = False) -> str:
    """The name of the method that `auto` takes: the first that fits of factor-svd, row-gram, dense, lanczos.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> choose_method(bnp.DenseOperator(torch.eye(3)))
        'dense'
    """
    return automatic(A, indefinite=indefinite).name


def next_method(A: SymmetricOperator) -> str:
    """What would close a one-sided answer, with its cost, in words."""
    usable = {cost.method: cost for cost in methods(A) if cost.applies}
    found = next((usable[method.name] for method in registered() if method.decides and method.name in usable), None)
    if found is None:
        return ""
    return f"; next: method={found.method!r}, about {found.products:.0f} products, {found.memory / 2**30:.2g} GiB"
