"""The loss along directions and its quadratic model, sharpness along a step, eigenvector mass by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnp_analysis.curvature import hessian
from bnp_analysis.errors import InvalidInputError, NoDerivativeError, NonFiniteError
from bnp_analysis.linalg import Eigenpairs
from bnp_analysis.linalg.scale import comfortable, times_power
from bnp_analysis.network import EmpiricalRisk, ParameterSpace
from bnp_analysis.network.parameters import Block
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated, require_plain
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.progress import Progress, reporting

Floats = NDArray[np.float64]
Direction = Tensor | Mapping[str, Tensor] | str
# Halvings of the interval of a critical step, and doublings that look for one.
_HALVINGS, _DOUBLINGS = 20, 40
# Units of `eps` that a loss is rounded to, relative to its value and to what its arguments' rounding does to it.
_LOSS_ROUNDINGS = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class Slice(Result):
    """The loss along a line, or in a plane, through a point.

    Attributes:
        distances: `(m,)` from the point, in units of the parameters; in a plane along both directions.
        loss: `(m,)`, in a plane `(m, m)` with the first direction's distances first; NaN where it is not finite.
        quadratic: the same of `L + g.d + d.Hd / 2`; NaN where the risk has no second derivative.
        slopes: `(k,)` derivatives `g.u` along the unit vectors `u`.
        curvatures: `(k, k)` second derivatives `u.Hv`.
        labels: of the directions.
    """

    distances: Floats
    loss: Floats
    quadratic: Floats
    slopes: Floats
    curvatures: Floats
    labels: tuple[str, ...]

    def summary(self) -> str:
        """Slopes, curvatures, and how far the quadratic model is off at the ends."""
        along = ", ".join(
            f"{label}: slope {self.slopes[i]:.4g}, curvature {self.curvatures[i, i]:.4g}"
            for i, label in enumerate(self.labels)
        )
        gap = np.abs(self.loss - self.quadratic)
        off = f"{np.nanmax(gap):.3g}" if np.isfinite(gap).any() else "not known"
        lost = int((~np.isfinite(self.loss)).sum())
        return (
            f"loss {np.nanmin(self.loss):.6g} .. {np.nanmax(self.loss):.6g} within {self.distances[-1]:.3g} along "
            f"{along}; largest error of the quadratic model {off}" + (f"; not finite at {lost} points" if lost else "")
        )

    def records(self) -> list[dict[str, float]]:
        """One row per point: distance (in a plane both), loss, quadratic."""
        names = ["distance", "distance_2"][: self.loss.ndim]
        places = np.stack(np.meshgrid(*[self.distances] * self.loss.ndim, indexing="ij"), axis=-1)
        columns = zip(places.reshape(-1, self.loss.ndim), self.loss.ravel(), self.quadratic.ravel(), strict=True)
        return [
            dict(zip(names, map(float, at), strict=True)) | {"loss": float(x), "quadratic": float(q)}
            for at, x, q in columns
        ]


@full_float32
@gated
def slice(
    risk: EmpiricalRisk,
    direction: Direction,
    second: Direction | None = None,
    *,
    points: int = 41,
    radius: float | None = None,
    progress: Progress = False,
) -> Slice:
    """The loss `L(theta + t u)` along a direction, or in the plane of two, beside its quadratic model.

    Directions are brought to length 1 and, in a plane, the second is made orthogonal to the first; nothing is rescaled
    filter by filter, so that distances are those of the parameters and curvatures those of the Hessian.

    Args:
        risk: the empirical risk.
        direction, second: `"gradient"`, a flat vector `(n,)`, for instance `eigenpairs(...).vectors[:, 0]`, or
            tensors by their names.
        points: on each axis, at least 3.
        radius: the largest distance on either side; default a tenth of the length of the parameters.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Slice`; `plotting.plot_slice` draws it.

    Raises:
        InvalidInputError: a direction of another size, zero or not finite, a second one parallel to the first, fewer
        than 3 points or a radius that is not positive.

    Source: Goodfellow, Vinyals and Saxe 2015; Li et al. 2018 for why filters are rescaled elsewhere.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
        >>> found = bnp.slice(bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, y)), "gradient", points=5)
        >>> bool(abs(found.loss - found.quadratic).max() < 1e-12), round(found.curvatures.item(), 6)
        (True, 1.0)
    """
    began = time.perf_counter()
    if points < 3:
        raise InvalidInputError(f"points must be at least 3, got {points}")
    if radius is not None and not 0 < radius < math.inf:
        raise InvalidInputError(f"radius must be positive and finite, got {radius}")
    given = [direction] if second is None else [direction, second]
    units: list[Tensor] = []
    for i, one in enumerate(given):
        u = _unit(_flat(risk, one), "the direction is")
        if units:
            rest = u - (units[0] @ u) * units[0]
            # What is left of a parallel vector is its rounding.
            if float(rest.norm()) < 1e3 * risk.eps * len(u) ** 0.5:
                raise InvalidInputError("the second direction is parallel to the first, so they span no plane")
            u = _unit(rest - (units[0] @ rest) * units[0], f"direction {i + 1} is")
        units.append(u)
    basis = torch.stack(units, dim=1)
    require_memory(8 * 12 * points ** len(units), f"the losses at {points} points on each axis", "Use fewer points")
    radius = _length(risk.theta) / 10 or 1.0 if radius is None else float(radius)
    distances = np.linspace(-radius, radius, points)
    slopes = (basis.T @ risk.gradient).double().cpu().numpy()
    products, curvatures = len(units), np.full((len(units), len(units)), math.nan)
    try:
        curved = (basis.T @ (hessian(risk) @ basis)).double().cpu().numpy()
        curvatures = (curved + curved.T) / 2
    except NoDerivativeError:
        products = 0
    grid = np.stack(np.meshgrid(*[distances] * len(units), indexing="ij"), axis=-1)
    losses = np.full(grid.shape[:-1], math.nan)
    with reporting(progress, losses.size, "loss along directions") as update:
        for done, place in enumerate(np.ndindex(losses.shape)):
            step = basis @ torch.as_tensor(grid[place]).to(basis)
            try:
                losses[place] = float(risk(risk.theta + step))
            except NonFiniteError:
                losses[place] = math.nan
            update(done + 1)
    model = float(risk.value) + grid @ slopes + 0.5 * np.einsum("...i,ij,...j->...", grid, curvatures, grid)
    return Slice(
        distances=distances,
        loss=losses,
        quadratic=model,
        slopes=slopes,
        curvatures=curvatures,
        labels=tuple(_name(one, i) for i, one in enumerate(given)),
        settings={"points": points, "radius": radius},
        engine=risk.provenance,
        matvecs=products,
        seconds=time.perf_counter() - began,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class DirectionalSharpness(Result):
    """The curvature that a step meets, by second derivatives and by the loss itself.

    Attributes:
        value: `u.Hu / u.g`, for a gradient step `g.Hg / |g|^2`; NaN where the risk has no second derivative.
        critical: `2 / eta_c`, `eta_c` the step size at which `L(theta - eta u)` is `L(theta)` again; 0 where it never
            is within the doublings tried. Of a quadratic loss it equals `value`.
        critical_lower, critical_upper: between them the loss crosses `L(theta)`, whatever rounding has done to its
            values; 0 and infinity where it hides all growth, or every loss below `L(theta)`.
        evaluations: of the loss.
        label: of the step.
    """

    value: float
    critical: float
    critical_lower: float
    critical_upper: float
    evaluations: int
    label: str

    def summary(self) -> str:
        """Both numbers and the step size they stand for."""
        step = f"{2 / self.critical:.4g}" if self.critical else "not reached"
        return (
            f"directional sharpness {self.value:.4g}, critical sharpness {self.critical:.4g} "
            f"({self.critical_lower:.4g} .. {self.critical_upper:.4g}) along {self.label}; critical step size {step}, "
            f"{self.evaluations} evaluations"
        )


@full_float32
@gated
def directional_sharpness(risk: EmpiricalRisk, step: Direction = "gradient") -> DirectionalSharpness:
    """How sharp the loss is along one step: `u.Hu / u.g`, and `2 / eta_c` from evaluations of the loss alone.

    A step of size `eta` changes a quadratic loss by `-eta u.g + eta^2 u.Hu / 2`, so that it grows beyond
    `eta_c = 2 u.g / u.Hu`. The loss itself is asked by doubling and halving from there, then by bisection.

    Args:
        risk: the empirical risk.
        step: `u` of the step `theta - eta u`: `"gradient"`, a flat vector `(n,)` or tensors by their names, for
            instance an optimizer's update over its learning rate.

    Returns:
        A `DirectionalSharpness`.

    Raises:
        InvalidInputError: `u.g` is not positive, so that no small step reduces the loss; a step of another size, zero
        or not finite.

    Source: Pan and Li 2023 for directional, Kalra and Barkeshli 2024 for critical sharpness.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
        >>> found = directional_sharpness(bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, y)))
        >>> round(found.value, 4), round(found.critical, 4)
        (1.0, 1.0)
    """
    began = time.perf_counter()
    u, value = _flat(risk, step), math.nan
    length = _length(u)
    u = _unit(u, "the step is")
    slope = float(u.double() @ risk.gradient.double())
    if not slope > 0:
        raise InvalidInputError(
            f"the step has u.g = {slope * length:.3g}, so no small step theta - eta u reduces the loss: at a critical "
            "point there is no such step, else give the step with the other sign"
        )
    products = 0
    try:
        value = float(u.double() @ (hessian(risk) @ u).double()) / slope * length
        products = 1
    except NoDerivativeError:
        pass
    here, count = float(risk.value), 0
    sensitivity = _length(risk.theta) * _length(risk.gradient)

    def growth(eta: float) -> tuple[float, float]:
        """`L(theta - eta u) - L(theta)`, and what rounding leaves of it: of values, and of what goes into the model."""
        nonlocal count
        count += 1
        try:
            there = float(risk(risk.theta - eta * u))
        except NonFiniteError:
            return math.inf, 0.0
        moved = sensitivity + eta * slope
        return there - here, _LOSS_ROUNDINGS * risk.eps * (abs(here) + abs(there) + moved)

    # In units of the unit step: where a quadratic would be back, else a tenth of the parameters' length.
    eta = 2 * length / value if value > 0 else _length(risk.theta) / 10 or 1.0
    low, high = 0.0, math.inf
    for _ in range(_DOUBLINGS):
        if growth(eta)[0] > 0:
            high, eta = eta, eta / 2
        else:
            low, eta = eta, 2 * eta
        if low > 0 and high < math.inf:
            break
    for _ in range(_HALVINGS if low > 0 and high < math.inf else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if growth(middle)[0] > 0 else (middle, high)
    critical = 4 * length / (low + high) if high < math.inf else 0.0
    # Outwards to where rounding cannot have decided.
    width = high - low
    low = _outwards(growth, low, -width)
    high = _outwards(growth, high, width)
    ends = [2 * length / x if x else math.inf for x in (high, low)]
    return DirectionalSharpness(
        value=value,
        critical=critical,
        critical_lower=ends[0],
        critical_upper=ends[1],
        evaluations=count,
        label=_name(step, 0),
        engine=risk.provenance,
        matvecs=products,
        seconds=time.perf_counter() - began,
    )


def _outwards(growth: Callable[[float], tuple[float, float]], end: float, width: float) -> float:
    """The end of a bracket moved until its growth is surely of one sign; 0 or infinity where it nowhere is."""
    for _ in range(_DOUBLINGS):
        if not 0 < end < math.inf:
            return end
        found, rounding = growth(end)
        if (found if width > 0 else -found) > rounding:
            return end
        end, width = max(0.0, end + width), 2 * width
    return 0.0 if width < 0 else math.inf


@dataclass(frozen=True, kw_only=True, repr=False)
class EigenvectorMass(Result):
    """Which part of each eigenvector's squared length lies in which block of parameters.

    Attributes:
        values: `(k,)` eigenvalues.
        residuals: `(k,)` theirs: a vector is as uncertain as its residual over the distance to other eigenvalues.
        names: of the blocks.
        mass: `(k, b)`; a row sums to 1 where the blocks are disjoint and cover all parameters.
        sizes: `(b,)` the part of all parameters that a block has: what a random vector's mass would be.
    """

    values: Floats
    residuals: Floats
    names: tuple[str, ...]
    mass: Floats
    sizes: Floats

    def summary(self) -> str:
        """Where each of the first eigenvectors has most of its mass."""
        most = ", ".join(
            f"{v:.4g}: {self.names[int(row.argmax())]} ({row.max():.2f})"
            for v, row in zip(self.values[:5], self.mass, strict=False)
        )
        return f"mass of {len(self.values)} eigenvectors in {len(self.names)} blocks; {most}"

    def records(self) -> list[dict[str, object]]:
        """One row per eigenvalue, a column per block."""
        columns = zip(self.values.tolist(), self.residuals.tolist(), self.mass.tolist(), strict=True)
        return [{"eigenvalue": v, "residual": r} | dict(zip(self.names, row, strict=True)) for v, r, row in columns]


@gated
def eigenvector_mass(
    pairs: Eigenpairs, space: ParameterSpace, *, blocks: Mapping[str, Block] | Sequence[str] | None = None
) -> EigenvectorMass:
    """The part `sum_{i in block} v_i^2` of each unit eigenvector in each block of parameters.

    Args:
        pairs: from `eigenpairs`, of an operator over all parameters of the space.
        space: `risk.space`.
        blocks: names or patterns, or blocks by their labels, as for `block_spectra`; default the modules that own
            parameters.

    Returns:
        An `EigenvectorMass`; `plotting.plot_eigenvector_mass` draws it.

    Raises:
        InvalidInputError: vectors of another length than the space, an unknown block.

    Source: none; the lengths of projections.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> space = bnp.ParameterSpace({"a.weight": (1, 2), "b.weight": (1, 1)})
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)))
        >>> eigenvector_mass(bnp.eigenpairs(A, k=1), space).mass.round(6).tolist()
        [[0.0, 1.0]]
    """
    if pairs.vectors.shape[0] != space.dim:
        raise InvalidInputError(
            f"the eigenvectors have {pairs.vectors.shape[0]} entries, the space {space.dim}; give the space of the "
            "risk that the operator was made from, restricted as its block= was"
        )
    if blocks is None:
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in space.names))
        own = {owner: [n for n in space.names if n.rpartition(".")[0] == owner] for owner in owners}
        places = {owner or "(root)": torch.cat([space.indices(n) for n in names]) for owner, names in own.items()}
    else:
        listed = dict(blocks) if isinstance(blocks, Mapping) else {str(block): block for block in blocks}
        places = {label: space.indices(block) for label, block in listed.items()}
        if not places:
            raise InvalidInputError("blocks is empty; leave it out for every layer")
    squares = pairs.vectors.double().square()
    return EigenvectorMass(
        values=pairs.values.numpy(),
        residuals=pairs.residuals.numpy(),
        names=tuple(places),
        mass=torch.stack([squares[p].sum(dim=0) for p in places.values()], dim=1).numpy(),
        sizes=np.array([len(p) / space.dim for p in places.values()]),
        settings=pairs.settings,
        seed=pairs.seed,
        matvecs=pairs.matvecs,
    )


def _flat(risk: EmpiricalRisk, direction: Direction) -> Tensor:
    """A direction as a flat vector in the risk's dtype and place."""
    if isinstance(direction, str):
        if direction != "gradient":
            raise InvalidInputError(f"a direction is 'gradient', a flat tensor or tensors by name, got {direction!r}")
        return risk.gradient
    if isinstance(direction, Mapping):
        direction = risk.space.flatten(direction)
    if not isinstance(direction, Tensor) or direction.shape != (risk.space.dim,):
        shape = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise InvalidInputError(
            f"a direction must be a flat tensor ({risk.space.dim},), got {shape}; of eigenpairs take one column, "
            "pairs.vectors[:, 0]"
        )
    require_plain(direction, "a direction")
    return direction.detach().to(risk.theta)


def _unit(direction: Tensor, what: str) -> Tensor:
    # Squares of entries far from 1 leave the floats.
    near, _ = comfortable(direction.double())
    length = float(near.norm())
    if not 0 < length < math.inf:
        raise InvalidInputError(
            f"{what} zero or not finite (its length is {length}), so there is no line along it; at a critical point "
            "the gradient is zero: take an eigenvector"
        )
    return (near / length).to(direction.dtype)


def _length(direction: Tensor) -> float:
    near, power = comfortable(direction.double())
    return float(times_power(near.norm(), -power))


def _name(direction: Direction, place: int) -> str:
    return direction if isinstance(direction, str) else f"direction {place + 1}"
