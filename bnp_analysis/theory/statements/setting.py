"""What the checks of statements share: the problem that a user gives, its dense references, and when to refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.curvature import gauss_newton, hessian
from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.linalg import Preconditioner, SymmetricOperator
from bnp_analysis.network import Coverage, EmpiricalRisk, Layer, coverage, layer_rows
from bnp_analysis.network.layers import products_only
from bnp_analysis.network.parameters import Block
from bnp_analysis.precondition import BNPPreconditioner, bnp_preconditioner
from bnp_analysis.runtime.random import generator
from bnp_analysis.symmetry import NullDirections, null_directions
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.activations import Activations, activations

# Parameters of a dense reference matrix, and numbers in the factor that it is made of.
DENSE_LIMIT = 1_500
FACTOR_LIMIT = 40_000_000
_UNDAMPED = {
    "eps1": 0.0,
    "eps2": 0.0,
    "q": "auto",
    "statistics": "channel",
    "bias_free": "rank-one",
    "output_scale": False,
}


class NotApplicable(Exception):
    """A hypothesis fails, or could not be verified; the message is the reason."""


class Problem:
    """A risk with a preconditioner, and what several checks need of them, computed once.

    Args:
        risk: the empirical risk.
        preconditioner: over `risk.space`; default the undamped BNP one.
        seed: of every random choice.
        limit: parameters up to which dense reference matrices are formed.

    Attributes:
        given: whether the preconditioner is the caller's own.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        preconditioner: Preconditioner | None = None,
        *,
        seed: int = 0,
        limit: int = DENSE_LIMIT,
    ) -> None:
        # Statements look at rows and examples: with several processes each of them has all.
        self.risk, self.seed, self.limit = risk.gathered(), seed, limit
        self.given = preconditioner is not None
        self._preconditioner = preconditioner
        # What two statements need: the second finds what the first computed.
        self.results: dict[Any, Any] = {}

    @cached_property
    def layers(self) -> Coverage:
        """The covered layers.

        Raises:
            NotApplicable: there is none.
        """
        found = coverage(self.risk)
        if not found.covered:
            why = "; ".join(f"{n}: {reason}" for n, reason in found.uncovered.items())
            raise NotApplicable(f"no covered layer ({why})")
        return found

    @cached_property
    def bnp(self) -> BNPPreconditioner:
        """The undamped BNP preconditioner: the given one if it is that, else made here."""
        given = self._preconditioner
        if isinstance(given, BNPPreconditioner) and all(given.settings.get(k) == v for k, v in _UNDAMPED.items()):
            return given
        _ = self.layers
        return bnp_preconditioner(self.risk)

    @cached_property
    def P(self) -> Preconditioner:
        """The given preconditioner, or BNP's."""
        return self.bnp if self._preconditioner is None else self._preconditioner

    @cached_property
    def moving(self) -> Problem:
        """The problem where its gradient is more than rounding: here, or a little beside a critical point."""
        theta = self.risk.theta
        noise = torch.randn(theta.shape, generator=self.random(1), dtype=torch.float64).to(theta)
        beside = self.risk.at(theta + 0.01 * (theta.abs() + theta.abs().mean()) * noise)
        if self.risk.gradient.norm() > 1e-6 * beside.gradient.norm():
            return self
        return Problem(beside, seed=self.seed, limit=self.limit)

    @cached_property
    def uses(self) -> dict[str, int]:
        """How often each covered layer runs in one forward pass."""
        counts = dict.fromkeys((layer.name for layer in self.layers), 0)

        def note(name: str, module: Any, args: Any, output: Any) -> None:
            counts[name] += 1

        self.risk.capture(note, counts)
        return {name: count // self.risk.batches.number for name, count in counts.items()}

    @cached_property
    def alone(self) -> set[str]:
        """The covered layers whose weight acts through its product alone, not inside derivatives in `forward`."""
        leaves, batch = self.risk.leaves(), next(iter(self.risk.batches))
        outputs, seen = self.risk.record(batch, [layer.name for layer in self.layers], leaves)
        return products_only(self.layers, leaves, outputs, seen)

    def require_once(self, layer: Layer) -> None:
        """Refuse a layer that runs several times in one forward pass, or that derivatives inside it use again.

        Raises:
            NotApplicable: with the number.
        """
        if layer.name not in self.alone:
            raise NotApplicable("forward() differentiates through the layer: its weight acts beside its own product")
        if self.uses[layer.name] != 1:
            raise NotApplicable(f"the layer runs {self.uses[layer.name]} times in one forward pass")

    def require_smooth(self) -> None:
        """Refuse points without derivatives.

        Raises:
            NotApplicable: an entry lies exactly on a kink.
        """
        count = self.activations.on_kink
        if count:
            raise NotApplicable(
                f"{count} pre-activations lie exactly on a kink: there is no derivative, and the one that is computed "
                "depends on rounding"
            )

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The rows of every covered layer, `(R, groups, m)`."""
        return layer_rows(self.risk, self.layers)

    @cached_property
    def activations(self) -> Activations:
        """What kind of nonlinear operations the network has."""
        return activations(self.risk)

    @cached_property
    def null(self) -> NullDirections:
        """The verified null directions of the Gauss-Newton matrix."""
        self.require_size(self.risk.space.dim)
        return null_directions(self.risk)

    @cached_property
    def factor(self) -> Tensor:
        """The dense factor `F`, `F^T F` the Gauss-Newton matrix of the whole network.

        Raises:
            NotApplicable: there is none, or it is too large.
        """
        self.require_size(self.risk.space.dim)
        found = gauss_newton(self.risk).factor
        if found is None:
            raise NotApplicable("the loss is not convex in the outputs, or not separate over examples: no factor")
        if found.shape[0] * found.shape[1] > FACTOR_LIMIT:
            raise NotApplicable(
                f"the dense factor is {found.shape[0]} x {found.shape[1]}, more than {FACTOR_LIMIT:,} numbers"
            )
        return found.to_dense()

    def dense(self, kind: str, block: Block | None = None) -> Tensor:
        """A dense `"hessian"` or `"gauss-newton"` matrix or block.

        Raises:
            NotApplicable: it is too large.
        """
        make: Callable[..., SymmetricOperator] = {"hessian": hessian, "gauss-newton": gauss_newton}[kind]
        A = make(self.risk, block=block)
        self.require_size(A.dim)
        return A.to_dense()

    def require_size(self, dim: int, what: str = "a dense reference matrix") -> None:
        """Refuse dense work beyond the limit, with the size.

        Raises:
            NotApplicable: `dim` is larger than the limit.
        """
        if dim > self.limit:
            raise NotApplicable(f"{dim} parameters; {what} takes up to {self.limit}")

    def some_units(self, layer: Layer, count: int = 3) -> list[int]:
        """A few units of a layer, spread over it."""
        return sorted({i * (layer.units - 1) // max(count - 1, 1) for i in range(min(count, layer.units))})

    def random(self, stream: int) -> torch.Generator:
        """A local generator, another for each purpose."""
        return generator(self.seed, stream)


@dataclass(frozen=True)
class Statement:
    """A statement, and how it is tried on a problem.

    Called with a risk it gives its checks; never an error for a problem that it does not apply to.

    Attributes:
        source: which one it is.
        words: what it says, for tables where it could not be tried.
        attempt: the checks of one problem, one after the other.
    """

    source: Source
    words: str
    attempt: Callable[[Problem], Iterable[Check]]

    def __call__(
        self, risk: EmpiricalRisk | Problem, preconditioner: Preconditioner | None = None, *, seed: int = 0
    ) -> tuple[Check, ...]:
        """The checks of this statement over a risk.

        Args:
            risk: the empirical risk, in float64.
            preconditioner: over `risk.space`; default the undamped BNP one.
            seed: of random choices.

        Returns:
            At least one `Check`.
        """
        problem = risk if isinstance(risk, Problem) else Problem(risk, preconditioner, seed=seed)
        return tuple(self.run(problem))

    def run(self, problem: Problem) -> Iterator[Check]:
        """The checks as they are made; what cannot be tried is *not applicable*, with the reason."""
        if problem.risk.eps > torch.finfo(torch.float64).eps:
            yield self.not_applicable(
                f"{problem.risk.precision}: rounding would hide what is checked; measure in float64 throughout"
            )
            return
        try:
            found = 0
            for check in self.attempt(problem):
                found += 1
                yield check
            if not found:
                yield self.not_applicable("nothing in this network that it speaks of")
        except NotApplicable as refusal:
            yield self.not_applicable(str(refusal))
        except BNPAnalysisError as error:
            yield self.not_applicable(f"could not be tried: {error}")

    def not_applicable(self, reason: str, **more: Any) -> Check:
        """The verdict without numbers."""
        return Check.not_applicable(self.words, self.source, reason, **more)


def statement(source: Source, words: str) -> Callable[[Callable[[Problem], Iterable[Check]]], Statement]:
    """Make a function over a problem the check of a statement."""

    def named(attempt: Callable[[Problem], Iterable[Check]]) -> Statement:
        made = Statement(source, words, attempt)
        object.__setattr__(made, "__doc__", attempt.__doc__)
        return made

    return named


def each_layer(
    problem: Problem,
    words: str,
    source: Source,
    attempt: Callable[[Problem, Layer], Iterable[Check]],
    dense: bool | None = None,
) -> Iterator[Check]:
    """The checks of every covered layer, or of the dense ones or convolutions; a refusal is that layer's alone."""
    for layer in problem.layers:
        if dense is not None and dense != isinstance(layer.module, nn.Linear):
            continue
        try:
            yield from attempt(problem, layer)
        except NotApplicable as refusal:
            yield Check.not_applicable(f"{words} [{label(layer)}]", source, str(refusal))
        except BNPAnalysisError as error:
            yield Check.not_applicable(f"{words} [{label(layer)}]", source, f"could not be tried: {error}")


def label(layer: Layer) -> str:
    """The layer's name, or its type for a bare one."""
    return layer.name or type(layer.module).__name__


def distance(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in the norm of all entries; infinite where only `expected` is zero."""
    gap, size = float((found - expected).norm()), float(expected.norm())
    return gap / size if size > 0 else (0.0 if gap == 0 else math.inf)


def agreement(
    words: str, source: Source, found: Tensor, expected: Tensor, *, bound: float = 1e-9, **more: Any
) -> Check:
    """Whether two arrays agree: their relative distance is at most `bound`, which rounding must explain."""
    return Check.compare(
        words, source, observed=distance(found, expected), predicted=bound, tolerance=0.0, relation="<=", **more
    )
