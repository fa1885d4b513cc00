"""The benchmarks of cost run, compare right products only, and count flops by a formula that holds.

Bugs that only these tests catch: a product that is wrong and timed all the same; a flop limit that
no product could meet or that any would; a residual check that finds nothing wrong; a table that cannot be written.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import bnp_analysis as bnp

SUITE = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    if not SUITE.is_dir():
        pytest.skip("the benchmarks are not part of this installation")
    monkeypatch.syspath_prepend(str(SUITE))


def test_flop_limits_by_hand() -> None:
    """`m d` multiplications for a dense layer; the first layer has no cotangent of its input."""
    import side_by_side

    widths, n = [7, 5, 4, 3], 6
    sizes = [a * b for a, b in pairwise(widths)]
    gradient = 2 * n * (2 * sizes[0] + 3 * sum(sizes[1:]))
    found = side_by_side.flop_limits(bnp.models.mlp(widths), torch.rand(n, 7, dtype=torch.get_default_dtype()))
    assert found["gradient"] == gradient
    assert found["hessian"] == pytest.approx(2 * n * (2 * sizes[0] + 6 * sum(sizes[1:])) / gradient)
    assert found["gauss-newton"] == pytest.approx(2 * n * (2 * sizes[0] + 4 * sum(sizes[1:])) / gradient)


def test_a_wrong_product_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import product_methods
    import products

    p = product_methods.Problem("MLP", 8, "cpu")
    monkeypatch.setitem(product_methods.METHODS["Hessian"], "wrong", lambda p: lambda v: 1.1 * v)
    monkeypatch.setitem(product_methods.METHODS["Hessian"], "broken", lambda p: lambda v: v[:0] @ v)
    reference: dict[str, torch.Tensor] = {}
    assert "wrong by" in str(products.product_of(p, "Hessian", "wrong", reference))
    assert products.product_of(p, "Hessian", "broken", reference) == "fails: RuntimeError"
    assert callable(products.product_of(p, "Hessian", "torch, double backward retained", reference))


def test_products_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import products

    with torch.random.fork_rng(devices=[]):
        assert products.main(["--quick", "--networks", "MLP", "--rounds", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "products.json").read_text())
    found = record["settings"]["CPU"]["MLP"]
    for matrix in ("Hessian", "Gauss-Newton"):
        assert found["ratios"][f"{matrix}: bnp_analysis"]["ratio"] > 0
        # The exact product needs the arithmetic that it needs.
        assert found["our_flops"][f"{matrix}: bnp_analysis"] >= found["flop_limits"][matrix.lower()] - 1e-9
    assert not [name for name in found["failed"] if "bnp_analysis" in name or "torch" in name]
    page = (tmp_path / "products.md").read_text()
    assert "flop limit" in page
    assert "Hessian: bnp_analysis" in page
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a CUDA device"):
            products.main(["--gpu"])


def test_residuals_are_checked_by_another_product() -> None:
    import krylov_peers

    network = krylov_peers.Network(bnp.data.load("digits", n=40), 1, "cpu")
    found = bnp.eigenpairs(bnp.hessian(network.risk(torch.float64)), 3, tol=1e-6)
    assert max(network.residuals(found.values, found.vectors)) < 2e-6
    assert min(network.residuals(1.01 * found.values, found.vectors)) > 5e-3
    wrong = found.vectors + 0.01 * torch.ones_like(found.vectors)
    assert min(network.residuals(found.values, wrong)) > 1e-2


def test_architectures_write_their_table(tmp_path: Path) -> None:
    """A graph network and a GPT whose dense layers are all covered, stored as they are."""
    import architectures

    words = ("qkv", "out", "up", "down")
    layers = {f"blocks.{i}.{word}" for i in range(2) for word in words} | {"head"}
    text = architectures.gpt()
    model = text.network(0)
    pre = bnp.BNP(model)
    text.loss(model(text.x[:2]), text.y[:2]).backward()
    pre.step()
    assert set(pre.covered) == layers
    assert architectures.main(["--quick", "--only", "gcn", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "architectures.json").read_text())["tasks"]["gcn"]
    assert [row[2] for row in found["runs"]] == list(architectures.METHODS)
    assert float(found["runs"][1][4]) <= 20  # with BNP it is there within these steps
    assert all(float(row[-1]) > 1 for row in found["profiles"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["krylov", "kill_resume"])
def test_the_others_run(name: str, tmp_path: Path) -> None:
    module = __import__(name)
    assert module.main(["--quick", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / f"{name}.json").read_text())["command"].endswith("--quick")
    assert (tmp_path / f"{name}.md").read_text().startswith("# ")
