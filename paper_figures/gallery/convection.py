"""A physics-informed network for the convection equation, and the ratio of its Hessian's eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from paper_figures.gallery import Entry, Row, Settings

PRECISION = 50


class Convection(nn.Module):
    """Rows `(x, t, 1, 0, 0)` give `u_t + u_x`, `(0, t, 0, 1, 0)` give `u(2 pi, t) - u(0, t)`, `(x, 0, 0, 0, 1)` `u`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, width), nn.Linear(width, 1)

    def forward(self, rows: Tensor) -> Tensor:
        place, residual, periodic, initial = rows[:, :2], rows[:, 2:3], rows[:, 3:4], rows[:, 4:5]
        y = torch.tanh(self.inner(place))
        slope = (1 - y * y) @ (self.outer.weight * self.inner.weight.sum(dim=1)).T
        end = torch.tanh(self.inner(place + 2 * math.pi * torch.eye(2, dtype=rows.dtype)[0]))
        return residual * slope + periodic * (end - y) @ self.outer.weight.T + initial * self.outer(y)


def rows(count: int, grid: Sequence[int], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` rows inside of the grid and all on its edges; targets, and weights that make one mean of three."""
    x, t = (torch.linspace(0, end, n).double() for end, n in zip((2 * math.pi, 1), grid, strict=True))
    points = torch.cartesian_prod(x[1:-1], t[1:])
    inside = points[torch.randperm(len(points), generator=g)[:count]]
    parts = (
        torch.cat([inside, inside.new_tensor([1, 0, 0]).expand(count, 3)], dim=1),
        torch.stack([0 * t, t, 0 * t, 0 * t + 1, 0 * t], dim=1),
        torch.stack([x, 0 * x, 0 * x, 0 * x, 0 * x + 1], dim=1),
    )
    total = sum(map(len, parts))
    weights = torch.cat([torch.full((len(part),), total / len(part)).double() for part in parts])
    targets = torch.cat([torch.zeros(count + len(t)).double(), x.sin()])
    return torch.cat(parts), torch.stack([targets, weights], dim=1)


def loss(output: Tensor, aim: Tensor) -> Tensor:
    """The three means of squares."""
    return (aim[:, 1] * (output[:, 0] - aim[:, 0]) ** 2).mean()


def measure(settings: Settings) -> Iterator[Row]:
    """After training in float32 as in the source, the routine of the source in both precisions."""
    for count in settings["residual points"]:
        g = torch.Generator().manual_seed(settings["seed"])
        x, y = rows(count, settings["grid"], g)
        model = Convection(settings["width"])
        for layer in (model.inner, model.outer):
            nn.init.xavier_normal_(layer.weight, generator=g)
            nn.init.zeros_(layer.bias)
        if settings["L-BFGS"]:
            _train(model, x.float(), y.float(), settings)
        risk = bnp.EmpiricalRisk(model.double(), loss, (x, y))
        H = bnp.hessian(risk)
        found = bnp.magnitude_condition_number(H)
        bounds: dict[str, Any] = {"lower": found.lower, "upper": found.upper, "exact": _exact(model, x, y)}
        case = f"{H.dim} parameters, {count} residual points"
        single = bnp.hessian(risk.to(torch.float32)).to_dense()
        for matrix, words in ((single, "float32"), (H.to_dense(), "float64")):
            sizes = deflated_power_iteration(matrix, g)
            yield Row(case=f"{case}, {words}", reported=abs(sizes[0] / sizes[-1]), agrees=False, **bounds)


def _train(model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> None:
    """Adam, then L-BFGS."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(settings["Adam"]):
        adam.zero_grad()
        loss(model(x), y).backward()
        adam.step()
    newton = torch.optim.LBFGS(model.parameters(), history_size=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        newton.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    for _ in range(settings["L-BFGS"]):
        newton.step(closure)


def deflated_power_iteration(H: Tensor, g: torch.Generator) -> list[float]:
    """All eigenvalues, one after another: at most 500 steps each, until a Rayleigh quotient changes by 1e-3.

    Not orthogonalized after the last product, and stopped by `|change| < 1e-3 (|value| + 1e-6)`, as in the source.
    """
    values: list[float] = []
    basis = H.new_zeros(len(H), 0)

    def unit(v: Tensor) -> Tensor:
        return v / (v.norm() + 1e-6)

    while len(values) < len(H):
        # One vector after another is projected out, as if they were orthogonal: I - Q L^-1 Q^T, L + L^T - I = Q^T Q.
        gram = (basis.T @ basis).tril(-1) + torch.eye(basis.shape[1], dtype=H.dtype)
        parts = torch.linalg.solve_triangular(gram, basis.T, upper=False)
        v, value = unit(torch.randn(len(H), generator=g, dtype=torch.float64).to(H.dtype)), math.nan
        for _ in range(500):
            v = unit(v - basis @ (parts @ v))
            image = H @ v
            before, value = value, float(image @ v)
            v = unit(image)
            if abs(before - value) / (abs(before) + 1e-6) < 1e-3:
                value = before
                break
        values.append(value)
        basis = torch.cat([basis, v[:, None]], dim=1)
    return values


def _exact(model: Convection, x: Tensor, y: Tensor) -> float:
    """The ratio of magnitudes from the Hessian by its formula in 50 digits: fixed point in the sums over rows.

    The output of a row is `sum_j a_j s_j + c`, where `s_j` depends on `(w_j, v_j, b_j)` of hidden unit `j` alone:
    second derivatives couple parameters of one unit.
    """
    with mpmath.workdps(PRECISION):
        one = 1 << 220
        inner, bias = model.inner.weight.tolist(), model.inner.bias.tolist()
        outer, shift = model.outer.weight[0].tolist(), model.outer.bias.item()
        width, n = len(outer), len(x)
        J = np.zeros((n, 4 * width + 1), dtype=object)
        value = [mpmath.mpf(0)] * n
        second = np.zeros((width, 4, 4, n), dtype=object)
        period = 2 * mpmath.mpf(math.pi)
        for i, (place, time, residual, periodic, initial) in enumerate(x.tolist()):
            for j, ((w, v), b, a) in enumerate(zip(inner, bias, outer, strict=True)):
                terms = [(mpmath.mpf(place), 1 if initial else -1)] + [(place + period, 1)] * (periodic == 1)
                s, first, curved = mpmath.mpf(0), [mpmath.mpf(0)] * 3, [[mpmath.mpf(0)] * 3 for _ in range(3)]
                for at, sign in [(place, 1)] if residual else terms:
                    row = (mpmath.mpf(at), mpmath.mpf(time), mpmath.mpf(1))
                    f = mpmath.tanh(w * row[0] + v * row[1] + b)
                    f1 = 1 - f * f
                    f2, f3 = -2 * f * f1, -2 * f1 * f1 + 4 * f * f * f1
                    if residual:
                        k, along = mpmath.mpf(w) + v, (1, 1, 0)
                        s += k * f1
                        for p in range(3):
                            first[p] += k * f2 * row[p] + along[p] * f1
                            for q in range(3):
                                curved[p][q] += k * f3 * row[p] * row[q] + f2 * (along[p] * row[q] + along[q] * row[p])
                    else:
                        s += sign * f
                        for p in range(3):
                            first[p] += sign * f1 * row[p]
                            for q in range(3):
                                curved[p][q] += sign * f2 * row[p] * row[q]
                value[i] += a * s
                J[i, 4 * j : 4 * j + 4] = [a * d for d in first] + [s]
                second[j, :3, :3, i] = [[a * c for c in line] for line in curved]
                second[j, :3, 3, i] = second[j, 3, :3, i] = first
            J[i, -1] = mpmath.mpf(initial)
            value[i] += shift * initial
        aims = y.tolist()
        weights = [mpmath.mpf(weight) / n for _, weight in aims]
        pull = [weight * (f - target) for weight, f, (target, _) in zip(weights, value, aims, strict=True)]

        fixed = np.vectorize(lambda t: int(mpmath.nint(t * one)), otypes=[object])
        F = fixed(J)
        A = F.T @ (fixed(np.array(weights))[:, None] * F // one) // one
        for j in range(width):
            block = slice(4 * j, 4 * j + 4)
            A[block, block] += np.dot(fixed(second[j]), fixed(np.array(pull))) // one
        H = mpmath.matrix([[mpmath.mpf(entry) / one for entry in line] for line in A.tolist()])
        values = [abs(e) for e in mpmath.eigsy((H + H.T) / 2, eigvals_only=True)]
        return float(max(values) / min(values))


ENTRY = Entry(
    title="Physics-informed network, convection equation",
    source=(
        "P. Rathore, W. Lei, Z. Frangella, L. Lu, M. Udell, *Challenges in Training PINNs: A Loss Landscape "
        "Perspective*, ICML 2024 (PMLR 235), appendix F.5 and Figure 10, `lambda_1/lambda_129`; its code "
        "(pratikrathore8/opt_for_pinns), `plotting/condition_number.ipynb` and `hessian.eigenvalues` of "
        "`src/pyhessian.py`."
    ),
    setting=(
        "`u_t + u_x = 0` on `[0, 2 pi] x [0, 1]`, periodic, `u(x, 0) = sin x`; one hidden layer of 32 tanh units, "
        "129 parameters, Glorot normal; the loss is the sum of three mean squares, with 2^8 or 2^10 residual points of "
        "the source's grid. Training in float32: 11,000 steps of Adam at rate 1e-4, then 1,500 calls of L-BFGS as in "
        "the notebook (the caption says 41,000 iterations). The seed is ours. No values were read off the figure."
    ),
    naive=(
        "power iteration with deflation for 129 eigenvalues (here of the matrix, formed once). Each iteration stops "
        "after 500 steps, or when its Rayleigh quotient changes by less than 1e-3 relative to its size plus 1e-6. In "
        "float32; here also in float64."
    ),
    certified="`magnitude_condition_number(hessian(risk))`: all eigenvalues of the dense matrix, with error radius.",
    check="the Hessian by a formula written by hand and its eigenvalues, in 50 digits.",
    why=(
        "An iteration stops while its vector still has components along other eigenvectors. Deflation by such vectors "
        "leaves components of the dominant eigenvectors in the complement, so that no later Rayleigh quotient falls "
        "below some ten-thousandths of the largest, in either precision; the smallest eigenvalue is below 1e-9 of the "
        "largest. The source calls its ratio a lower bound of the condition number, and here it is one. The ratio says "
        "nothing about growth: with four times the points the condition number doubles, while the ratio rises in "
        "float32 and falls in float64."
    ),
    presets={
        "quick": {"seed": 0, "width": 8, "grid": [17, 9], "residual points": [32], "Adam": 0, "L-BFGS": 0},
        "full": {
            **{"seed": 0, "width": 32, "grid": [257, 101], "residual points": [256, 1024]},
            **{"Adam": 11000, "L-BFGS": 1500},
        },
    },
    measure=measure,
)
