"""Small float64 networks on which the statements are tried; inputs are shifted, scaled and correlated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.theory import problems
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.statements.setting import Problem, Statement

CLASSES = 3
Make = Callable[[], nn.Module]


def inputs(rows: int, *shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *shape, generator=g, dtype=torch.float64)
    size = [1, shape[0], *[1] * (len(shape) - 1)]
    scale = 10 ** torch.linspace(-0.5, 0.5, shape[0], dtype=torch.float64).view(size)
    mixed = x + 0.4 * x.roll(1, dims=1)
    return scale * (mixed + torch.linspace(2.0, -1.0, shape[0], dtype=torch.float64).view(size))


def risk_of(make: Make, x: Tensor, *, train: bool = False, seed: int = 0) -> bnp.EmpiricalRisk:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        model(x[:2])
    model.train(train)
    return bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, torch.arange(len(x)) % CLASSES))


def relu(rows: int = 60, bias: bool = True, seed: int = 0) -> bnp.EmpiricalRisk:
    """6-5-3."""
    return risk_of(
        lambda: nn.Sequential(nn.Linear(6, 5, bias), nn.ReLU(), nn.Linear(5, CLASSES, bias)),
        inputs(rows, 6),
        seed=seed,
    )


def _conv(**options: object) -> bnp.EmpiricalRisk:
    return risk_of(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, **options), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        inputs(24, 2, 6, 6),
    )


NETWORKS: dict[str, Callable[[], bnp.EmpiricalRisk]] = {
    "relu": relu,
    "deep": lambda: risk_of(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.LeakyReLU(), nn.Linear(4, CLASSES)),
        inputs(60, 6),
    ),
    "no bias": lambda: relu(bias=False),
    "few rows": lambda: relu(5),
    "tanh": lambda: risk_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)), inputs(60, 6)),
    "linear": lambda: risk_of(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, CLASSES)), inputs(60, 6)),
    "bare": lambda: risk_of(lambda: nn.Linear(6, CLASSES), inputs(60, 6)),
    "constant feature": lambda: risk_of(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)),
        torch.cat([inputs(60, 5), torch.full((60, 1), 2.0, dtype=torch.float64)], dim=1),
    ),
    "sequence": lambda: risk_of(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, CLASSES)),
        inputs(30, 4, 3).movedim(1, 2),
    ),
    "batch norm, live": lambda: risk_of(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)),
        inputs(40, 6),
        train=True,
    ),
    "batch norm, fixed": lambda: risk_of(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)), inputs(40, 6)
    ),
    "conv": _conv,
    "conv, circular": lambda: _conv(padding=1, padding_mode="circular"),
    "conv, groups, zero padding": lambda: _conv(groups=2, stride=2, padding=1),
    "batches": lambda: bnp.EmpiricalRisk(
        bnp.models.mlp([6, 4, 3], seed=1, dtype=torch.float64),
        nn.functional.cross_entropy,
        [(inputs(20, 6), torch.arange(20) % 3), (inputs(7, 6, seed=1), torch.arange(7) % 3)],
    ),
}


class Reused(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.a(torch.relu(self.a(x)))))


def _on_a_kink() -> bnp.EmpiricalRisk:
    x = inputs(24, 4)
    x[3] = 0
    risk = _hidden(x)
    return risk.at({name: torch.zeros_like(t) if "bias" in name else t for name, t in risk.named_tensors().items()})


def _shuffled() -> bnp.EmpiricalRisk:
    data = torch.utils.data.TensorDataset(inputs(24, 4), torch.arange(24) % CLASSES)
    loader = torch.utils.data.DataLoader(data, batch_size=9, shuffle=True, generator=torch.Generator().manual_seed(0))
    model = bnp.models.mlp([4, 3, CLASSES], seed=1, dtype=torch.float64)
    return bnp.EmpiricalRisk(model, nn.functional.cross_entropy, loader)


def _hidden(x: Tensor, seed: int = 0, dead: bool = False) -> bnp.EmpiricalRisk:
    risk = risk_of(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, CLASSES)), x, seed=seed)
    return risk.at(risk.named_tensors() | {"0.bias": torch.full((3,), -9.0, dtype=torch.float64)}) if dead else risk


def _squared(loss: Callable[..., Tensor]) -> bnp.EmpiricalRisk:
    model = bnp.models.mlp([4, 3, CLASSES], seed=1, dtype=torch.float64)
    return bnp.EmpiricalRisk(model, loss, (inputs(24, 4), inputs(24, CLASSES, seed=1)))


# Where a careless check would give a wrong verdict. Those of `COSTLY` are like another one.
COSTLY = {"one example", "at a minimizer of a linear chain", "far from the origin", "duplicate features"}
AWKWARD: dict[str, Callable[[], bnp.EmpiricalRisk]] = {
    "at a minimizer with zero residual": lambda: problems.teacher_student((4, 3, 2), n=60).solved,
    "at a minimizer of a linear chain": lambda: problems.linear_chain((4, 3, 2), n=60).solved,
    "on a kink": _on_a_kink,
    "a layer that runs twice": lambda: risk_of(Reused, inputs(24, 4)),
    "a loader that shuffles": _shuffled,
    "one example": lambda: _hidden(inputs(1, 4)),
    "two examples": lambda: _hidden(inputs(2, 4)),
    "a saturated softmax": lambda: _hidden(1e4 * inputs(24, 4)),
    "tiny inputs": lambda: _hidden(1e-6 * inputs(24, 4), seed=1),
    "dead units": lambda: _hidden(1e-6 * inputs(24, 4), dead=True),
    "far from the origin": lambda: _hidden(1e4 + inputs(24, 4)),
    "duplicate features": lambda: _hidden(inputs(24, 2).repeat(1, 2)),
    "a loss without curvature": lambda: _squared(nn.functional.l1_loss),
    "a loss that is not convex": lambda: _squared(lambda outputs, y: torch.sin(3 * outputs - y).mean()),
}


def checks(statement: Statement, risk: bnp.EmpiricalRisk | Problem) -> tuple[Check, ...]:
    found = statement(risk)
    assert found, "a statement always says something"
    return found
