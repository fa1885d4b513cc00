"""What the neglected drift of a running `P` costs Langevin dynamics, against moments by quadrature.

    python benchmarks/langevin.py [--quick] [--out benchmarks/results/langevin.md]

`f(x) = w2 tanh(w1 x)` and, with the first layer used twice, `f(x) = w2 tanh(w1 tanh(w1 x))`, without biases, with
`U = (1/2 s^2) sum_j (f(x_j) - y_j)^2 + |w|^2 / 2`. Thousands of chains run side by side in formulas written out here,
which are first compared with `bnp.SGLD` and `bnp.BNP` on one chain. The law `exp(-U)` is integrated on a grid. In the
first network the drift `div(P P^T)` vanishes, in the second it does not.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import require_output, write_text

X = torch.tensor([-1.6, -0.8, 0.4, 1.2, 2.0], dtype=torch.float64)
Y = torch.tensor([-1.1, -0.5, 0.1, 0.9, 0.7], dtype=torch.float64)
NOISE, EPS2 = 1.0, 0.1
NAMES = ("w1^2", "w2^2", "U")
RULES: tuple[float | None, ...] = (None, 0.0, 0.9, 0.99)


def energy(w1: Tensor, w2: Tensor, uses: int) -> Tensor:
    """`U` for tensors of weights of one shape."""
    h = X.view(-1, *[1] * w1.ndim)
    for _ in range(uses):
        h = torch.tanh(w1 * h)
    misfit = (w2 * h - Y.view(-1, *[1] * w1.ndim)).square().sum(0) / (2 * NOISE**2)
    return misfit + (w1.square() + w2.square()) / 2


def exact(uses: int) -> Tensor:
    """The means of `NAMES` under `exp(-U)`, on a grid whose ends weigh nothing."""
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    w1, w2 = torch.meshgrid(grid, grid, indexing="ij")
    u = energy(w1, w2, uses)
    weight = torch.softmax(-u.flatten(), 0).view_as(u)
    return torch.stack([(weight * value).sum() for value in (w1.square(), w2.square(), u)])


class Net(nn.Module):
    """One chain, with layers that BNP covers."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.first, self.last, self.uses = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), uses

    def forward(self, h: Tensor) -> Tensor:
        for _ in range(self.uses):
            h = torch.tanh(self.first(h))
        out: Tensor = self.last(h)
        return out


class Chains:
    """Many chains at once: means and variances of both layers' inputs (T4) and `P` of layers without a bias (T5)."""

    def __init__(self, w: Tensor, uses: int, rho: float | None, lr: float) -> None:
        self.w, self.uses, self.rho, self.lr, self.k = w, uses, rho, lr, 0
        self.mean, self.variance = torch.zeros_like(w), torch.ones_like(w)

    def step(self, xi: Tensor) -> None:
        """One step with the noise `xi`, of the shape of the weights, `(2, chains)`."""
        w1, w2 = self.w
        inputs, h, factors = list[Tensor](), X[:, None].expand(-1, len(w1)), list[Tensor]()
        for _ in range(self.uses):
            inputs.append(h)
            h = torch.tanh(w1 * h)
            factors.append(1 - h.square())
        residual = (w2 * h - Y[:, None]) / NOISE**2
        g2, back, g1 = (residual * h).sum(0), residual * w2, torch.zeros_like(w1)
        for seen, factor in zip(reversed(inputs), reversed(factors), strict=True):
            back = back * factor
            g1 = g1 + (back * seen).sum(0)
            back = back * w1
        g = torch.stack([g1, g2]) + self.w
        p = torch.ones_like(self.w) if self.rho is None else self._factor([torch.cat(inputs), h])
        self.w = self.w - self.lr / 2 * p.square() * g + math.sqrt(self.lr) * p * xi

    def _factor(self, seen: list[Tensor]) -> Tensor:
        """`P = (sigma^2 + eps2 + mu^2)^(-1/2)` of one feature, from averages corrected for their start."""
        assert self.rho is not None
        self.k += 1
        past = 0.0 if self.k == 1 else (self.rho - self.rho**self.k) / (1 - self.rho**self.k)
        mean = torch.stack([h.mean(0) for h in seen])
        variance = torch.stack([h.var(0, correction=0) for h in seen])
        self.variance = past * self.variance + (1 - past) * variance + past * (1 - past) * (mean - self.mean).square()
        self.mean = past * self.mean + (1 - past) * mean
        return (self.variance + EPS2 + self.mean.square()).rsqrt()


def compare(uses: int, rho: float | None, steps: int = 20) -> float:
    """The largest difference in the weights between one of `Chains` and the package on the same chain."""
    model = Net(uses).double()
    with torch.no_grad():
        for p, value in zip(model.parameters(), (0.7, -0.4), strict=True):
            p.fill_(value)
    pre = None if rho is None else bnp.BNP(model, rho=rho, eps1=0, eps2=EPS2, q=1)
    sampler = bnp.SGLD(model.parameters(), lr=0.05, preconditioner=pre, seed=2)
    own = Chains(torch.tensor([[0.7], [-0.4]], dtype=torch.float64), uses, rho, 0.05)
    g = torch.Generator().manual_seed(2)
    for _ in range(steps):
        sampler.zero_grad()
        penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum() / 2
        ((model(X[:, None]) - Y[:, None]).square().sum() / (2 * NOISE**2) + penalty).backward()
        sampler.step()
        own.step(torch.cat([torch.randn(1, 1, generator=g, dtype=torch.float64) for _ in range(2)]))
    found = torch.cat([p.detach() for p in model.parameters()])
    return float((found - own.w).abs().max())


def sampled(uses: int, rho: float | None, lr: float, count: int, time: float) -> tuple[Tensor, Tensor]:
    """The means of `NAMES` along the chains and their standard errors; `rho=None` is the plain sampler."""
    g = torch.Generator().manual_seed(1)
    chains = Chains(torch.randn(2, count, generator=g, dtype=torch.float64), uses, rho, lr)
    steps, burn = round(time / lr), round(time / lr / 5)
    total = torch.zeros(3, count, dtype=torch.float64)
    for k in range(burn + steps):
        chains.step(torch.randn(2, count, generator=g, dtype=torch.float64))
        if k >= burn:
            w1, w2 = chains.w
            total += torch.stack([w1.square(), w2.square(), energy(w1, w2, uses)]) / steps
    return total.mean(1), total.std(1) / math.sqrt(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one rate, short chains")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/langevin.md"))
    options = parser.parse_args()
    require_output(options.out, "--out")
    count, time, rates = (500, 10.0, [0.08]) if options.quick else (2000, 40.0, [0.16, 0.04, 0.01])
    worst = max(compare(uses, rho) for uses in (1, 2) for rho in RULES)
    lines = [
        "# What the neglected drift of a running `P` costs",
        "",
        f"Relative errors of means under `exp(-U)` in %, with standard errors: {count} chains over a time `lr * steps` "
        f"of {time:g}, after a fifth of that. `python benchmarks/langevin.py`, torch {package_versions()['torch']}; "
        f"the largest difference from `bnp.SGLD` on one chain of 20 steps is {worst:.0e}. Used once, a layer's `P` "
        "depends on the layers below alone, and the drift is zero; used twice, it is not.",
        "",
        "| first layer | P | lr | " + " | ".join(NAMES) + " |",
        "|---|---|---|" + "---|" * len(NAMES),
    ]
    for uses in (1, 2):
        truth = exact(uses)
        for rho in RULES:
            for lr in rates:
                mean, error = sampled(uses, rho, lr, count, time)
                cells = [
                    f"{100 * (m / t - 1):+.1f} ± {100 * e / t:.1f}"
                    for m, e, t in zip(mean.tolist(), error.tolist(), truth.tolist(), strict=True)
                ]
                name = "I" if rho is None else f"running, rho {rho:g}"
                lines.append(
                    f"| used {'once' if uses == 1 else 'twice'} | {name} | {lr:g} | " + " | ".join(cells) + " |"
                )
                print(lines[-1], flush=True)
    write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(answered(main))
