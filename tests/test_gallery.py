"""The gallery of published numbers: routines of the sources, exact checks, the page.

Bugs that only this file catches: a routine of a source that fails where it should succeed (so that the gallery accuses
it falsely), an exact check that is not exact, a page that is not what the data say, an entry without its words.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import bnp_analysis as bnp
from paper_figures.figures import fig14_reported as figure
from paper_figures.frame import HERE, stored
from paper_figures.gallery import __main__ as writer
from paper_figures.gallery import convection, entries, linear_gauss_newton, linear_rank, longley


def test_every_entry_has_its_words() -> None:
    assert len(entries()) >= 5
    for name, entry in entries().items():
        words = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
        for field in ("source", "setting", "naive", "certified", "check", "why"):
            assert words[field].endswith("."), (name, field)


def test_the_page_is_what_the_data_say() -> None:
    data = stored(writer.NAME, HERE / "full")
    assert data is not None
    assert figure.failure(data) == ""
    assert writer.page(data) == writer.PAGE.read_text()
    assert writer.main(["--check"]) == 0
    assert set(data.words("entry")) == set(entries())


@pytest.mark.parametrize("module", [longley, linear_gauss_newton])
def test_intervals_contain_the_exact_number(module: object) -> None:
    entry = module.ENTRY  # type: ignore[attr-defined]
    rows = list(entry.measure(entry.presets["quick"] | {"spreads": [1e2]}))
    assert rows
    for row in rows:
        assert row.lower <= row.exact <= row.upper < row.lower * (1 + 1e-3)
        if row.agrees is not None:
            assert (figure.distance(row.reported, row.lower, row.upper) < 1e-6) is row.agrees


def test_the_deflated_power_iteration_finds_separated_eigenvalues() -> None:
    """Where gaps are wide its stopping rule is harmless: what the gallery shows is no fault of our copy."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    wanted = torch.tensor([1e4, -1e3, 1e2, 10.0, 1.0], dtype=torch.float64)
    found = convection.deflated_power_iteration(Q @ torch.diag(wanted) @ Q.T, g)
    assert found == pytest.approx(wanted.tolist(), rel=0.05)


def test_the_network_of_the_convection_equation() -> None:
    """Against autograd, and its Hessian in 50 digits against the one that is measured."""
    g = torch.Generator().manual_seed(0)
    x, y = convection.rows(6, (5, 4), g)
    model = convection.Convection(3).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=g)

    def u(place: torch.Tensor) -> torch.Tensor:
        return model.outer(torch.tanh(model.inner(place)))[:, 0]

    place = x[:, :2].clone().requires_grad_()
    slope = torch.autograd.grad(u(place).sum(), place)[0].sum(dim=1)[:6]
    start, time = x[6:10, :2], x[10:, :2]
    jump = u(start + torch.tensor([2 * math.pi, 0.0])) - u(start)
    means = (slope**2).mean() + (jump**2).mean() + ((u(time) - time[:, 0].sin()) ** 2).mean()
    torch.testing.assert_close(convection.loss(model(x), y), means)
    found = bnp.magnitude_condition_number(bnp.hessian(bnp.EmpiricalRisk(model, convection.loss, (x, y))))
    assert found.two_sided
    assert found.lower <= convection._exact(model, x, y) <= found.upper


def test_ranks_in_exact_arithmetic() -> None:
    """Of small integers, whose Hessian floats hold exactly, and of a product of known rank."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.randint(-3, 4, shape, generator=g).double() for shape in ((2, 4), (3, 2), (2, 3))]
    x, y = torch.randint(-3, 4, (7, 4), generator=g).double(), torch.randint(-3, 4, (7, 2), generator=g).double()
    model = nn.Sequential(*(nn.Linear(*w.T.shape, bias=False, dtype=torch.float64) for w in weights))
    for layer, w in zip(model, weights, strict=True):
        layer.weight.data = w
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, y))
    for A, hessian in ((bnp.hessian(risk), True), (bnp.gauss_newton(risk), False)):
        exact = linear_rank._matrix(weights, x, y, hessian=hessian)
        floats = (A.to_dense() * 7).round().long().numpy()  # the loss is a mean over 7 * 2 numbers, doubled by squares
        assert np.array_equal(exact, floats % linear_rank.PRIME)
    thin = torch.randint(-9, 9, (8, 3), generator=g)
    assert linear_rank._rank((thin @ thin.T).numpy() % linear_rank.PRIME) == 3
    half = linear_rank._modular(torch.tensor([0.5, -0.75]).double())
    assert (half * 4 % linear_rank.PRIME).tolist() == [2, linear_rank.PRIME - 3]


def test_a_claim_about_a_reported_number_can_fail() -> None:
    data = stored(writer.NAME, HERE / "full")
    assert data is not None
    for agrees, factor, word in (("yes", 1.01, "differs"), ("no", 0.0, "agrees")):
        numbers = data["numbers"].copy()
        k = data.words("agrees").index(agrees)
        numbers[k, 1] = numbers[k, 3] * factor if factor else numbers[k, 3]
        said = figure.failure(dataclasses.replace(data, arrays={**data.arrays, "numbers": numbers}))
        assert word in said, said
