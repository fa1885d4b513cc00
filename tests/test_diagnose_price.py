"""What a layer table says that it takes: a price that leaves out what takes most, grows with the wrong number, or is
asked after the work is done; a refusal that does not say how to go on; a method that takes minutes because only the
sizes of a factor were looked at are caught here."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import bnp_analysis as bnp
from bnp_analysis.diagnose import verbs
from bnp_analysis.diagnose.price import MOST_WORK, table_work
from bnp_analysis.errors import WorkLimitError
from bnp_analysis.linalg import CallableOperator, GramOperator, LinearOperator, choose_method
from bnp_analysis.linalg.condition.reduction import reducible
from bnp_analysis.network import coverage


def images(model: torch.nn.Module, size: int, examples: int) -> bnp.EmpiricalRisk:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(examples, 3, size, size, generator=g), torch.randint(0, 10, (examples,), generator=g)
    return bnp.EmpiricalRisk(model, cross_entropy, (x, y), dtype=torch.float64)


def small(examples: int = 16) -> bnp.EmpiricalRisk:
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(3), torch.nn.Conv2d(4, 6, 2)]
    head = [torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(54, 10)]
    model = torch.nn.Sequential(*layers, *head)
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.uniform_(-0.3, 0.3, generator=g)
    return images(model, 14, examples)


def test_operations_are_those_that_run() -> None:
    """Of the run itself torch counts products and convolutions, and here factorizations by their sizes."""

    def qr(shape: Any, *rest: Any, out_shape: Any = None, **words: Any) -> int:
        return 2 * max(shape) * min(shape) ** 2

    def svd(shape: Any, *rest: Any, out_shape: Any = None, **words: Any) -> int:
        return 10 * max(shape) * min(shape) ** 2

    counted = {torch.ops.aten.linalg_qr: qr, torch.ops.aten._linalg_svd: svd}
    risk = small()
    work = table_work(risk, coverage(risk))
    for name in work:
        with FlopCounterMode(display=False, custom_mapping=counted) as counter:
            bnp.layer_table(risk, layers=[name])
        assert 0.3 * counter.get_total_flops() <= work[name] <= 8 * counter.get_total_flops()


def test_a_table_loads_neither_the_compiler_nor_computer_algebra() -> None:
    """A second of every process: torch's own counter would load the one, `torch.autograd.grad` the other."""
    code = (
        "import sys, torch, bnp_analysis as bnp\n"
        "x, y = torch.rand(9, 3), torch.arange(9) % 2\n"
        "bnp.layer_table(bnp.EmpiricalRisk(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, (x, y)))\n"
        "sys.exit(bool({'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_price_grows_with_the_examples_not_with_their_weights() -> None:
    x, y = torch.rand(640, 5), torch.arange(640) % 3
    model = bnp.models.mlp([5, 7, 3])
    prices = []
    for data, count in (
        ((x, y), None),
        ([(x[:400], y[:400]), (x[400:], y[400:])], lambda pair: 1e6),
        ((x[:320], y[:320]), None),
    ):
        risk = bnp.EmpiricalRisk(model, cross_entropy, data, count=count, dtype=torch.float64)
        prices.append(table_work(risk, coverage(risk)))
    assert prices[0] == prices[1]
    for name, price in prices[2].items():
        assert 1.3 < prices[0][name] / price < 2.1


def test_a_table_of_days_is_refused_by_default() -> None:
    risk = images(bnp.models.build_for("resnet110", (3, 32, 32), 10), 32, 2)
    assert sum(table_work(risk, coverage(risk)).values()) * 10_000 / 2 > 10 * MOST_WORK


def test_the_refusal_comes_first_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = small()
    work = table_work(risk, coverage(risk))
    cheapest = min(work, key=lambda name: work[name])
    limit = 1.01 * work[cheapest]
    measure = verbs.block_numbers
    monkeypatch.setattr(verbs, "block_numbers", lambda *a, **k: pytest.fail("measured before it was priced"))
    with pytest.raises(WorkLimitError) as refused:
        bnp.layer_table(risk, max_flops=limit)
    words = str(refused.value)
    assert "the 1 cheapest of its 3 layers" in words
    assert all(word in words for word in ("layers=", "max_flops", "hours", f"{sum(work.values()):.1e}"))
    monkeypatch.setattr(verbs, "block_numbers", measure)
    table = bnp.layer_table(risk, layers=[cheapest], max_flops=limit)
    assert table.settings["flops"] == work[cheapest]
    with pytest.raises(WorkLimitError):
        bnp.compare(risk, max_flops=limit)


class Shaped(LinearOperator):
    """A factor of some shape that nobody multiplies with."""

    def __init__(self, *shape: int) -> None:
        super().__init__(shape, torch.float64, "cpu")

    def _matmat(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(self.shape[0], x.shape[1])

    def _rmatmat(self, y: torch.Tensor) -> torch.Tensor:
        return y.new_zeros(self.shape[1], y.shape[1])


@pytest.mark.parametrize(
    ("shape", "method"),
    [
        ((2_000, 40_000), "factor-svd"),
        ((5_000, 5_000), "factor-svd"),
        ((5_000, 100_000), "lanczos"),
        ((100_000, 4_900), "lanczos"),
        ((9_000, 9_000), "lanczos"),
    ],
)
def test_a_factor_is_decomposed_where_that_takes_a_minute(
    shape: tuple[int, int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = GramOperator(Shaped(*shape))
    for module in ("methods", "reduction"):
        where = __import__("sys").modules[f"bnp_analysis.linalg.condition.{module}"]
        monkeypatch.setattr(where, "available_memory", lambda *_: 10**12)
    assert choose_method(A) == method
    # A tall one is decomposed after a reduction, which many numbers share.
    assert reducible(A) == (method == "factor-svd" or shape == (100_000, 4_900))
    assert choose_method(CallableOperator(lambda v: v, 9_000)) == "lanczos"
