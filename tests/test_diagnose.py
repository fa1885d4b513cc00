"""The verbs: a table that swaps layers or forms, forgets constant features, mixes up with and without P, or measures
another block than it names is caught here, against dense matrices built by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import bnp_analysis as bnp
from bnp_analysis.diagnose import cell, spread
from bnp_analysis.diagnose.tables import gain, ratio
from bnp_analysis.errors import InvalidInputError


def effective(singular: np.ndarray, floor: float = 1e-11) -> float:
    kept = singular[singular > floor * singular.max()]
    return float(kept.max() / kept.min())


@pytest.fixture
def problem(generator: torch.Generator) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    x = 2 + torch.rand(60, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 1.0, 0.0])
    y = torch.randint(0, 3, (60,), generator=generator)
    return bnp.models.mlp([5, 6, 3], activation="leaky_relu", dtype=torch.float64), x, y


def test_inputs_are_the_singular_values_of_the_three_forms(problem):
    model, x, y = problem
    row = bnp.layer_table(bnp.EmpiricalRisk(model, cross_entropy, (x, y))).layers[0]
    H = x[:, :4].numpy()
    e = np.ones((60, 1))
    centred = H - H.mean(axis=0)
    forms = {"inputs": H, "centered": centred, "normalized": centred / centred.std(axis=0)}
    for name, form in forms.items():
        truth = effective(np.linalg.svd(np.hstack([e, form]), compute_uv=False))
        assert getattr(row, name).value == pytest.approx(truth, rel=1e-9)
        assert getattr(row, name).two_sided
    assert (row.rows, row.features, row.units, row.constant) == (60, 5, 6, 1)


def test_blocks_are_those_of_the_dense_gauss_newton_matrix(problem):
    model, x, y = problem
    risk = bnp.EmpiricalRisk(model, cross_entropy, (x, y))
    P = bnp.bnp_preconditioner(risk)
    table = bnp.layer_table(risk, P)
    A, dense_P = bnp.hessian(risk).to_dense(), P.to_dense()
    conditioned = dense_P.T @ A @ dense_P
    for row in table.layers:
        for i in range(row.units):
            where = risk.space.indices((row.layer, i))
            for found, matrix in ((row.unit_blocks[i], A), (row.unit_blocks_with_P[i], conditioned)):
                values = torch.linalg.eigvalsh(matrix[where][:, where]).numpy()
                truth = effective(np.abs(values), 1e-13)
                assert found.value == pytest.approx(truth, rel=1e-4)
        assert row.is_hessian


def test_smooth_activations_are_not_called_hessian_blocks(problem):
    _, x, y = problem
    model = bnp.models.mlp([5, 6, 3], activation="tanh", dtype=torch.float64)
    rows = bnp.layer_table(bnp.EmpiricalRisk(model, cross_entropy, (x, y))).layers
    assert [row.is_hessian for row in rows] == [False, True]


def test_convolution_units_come_from_the_layer_factor(generator):
    x = torch.rand(6, 2, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=generator)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        model[0].bias.fill_(0.5)
    risk = bnp.EmpiricalRisk(model, cross_entropy, (x, y))
    table = bnp.layer_table(risk)
    conv = table.layers[0]
    assert (conv.rows, conv.features, conv.groups) == (6 * 64, 9, 2)
    A = bnp.gauss_newton(risk).to_dense()
    for i, found in enumerate(conv.unit_blocks):
        where = risk.space.indices(("0", i))
        values = torch.linalg.eigvalsh(A[where][:, where]).numpy()
        assert found.value == pytest.approx(effective(np.abs(values), 1e-12), rel=1e-4)


def test_dead_units_are_counted_not_measured(problem):
    _, x, y = problem
    model = bnp.models.mlp([5, 6, 3], dtype=torch.float64)
    with torch.no_grad():
        model.fc1.bias[2] = -1e4
    row = bnp.layer_table(bnp.EmpiricalRisk(model, cross_entropy, (x, y))).layers[0]
    assert row.unit_blocks[2] is None
    assert row.dead >= 1


def test_compare_measures_in_float64_whatever_the_model_and_keeps_the_model(problem):
    model, x, y = problem
    model = model.float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    risk = bnp.EmpiricalRisk(model, cross_entropy, (x.float(), y))
    P = bnp.bnp_preconditioner(risk)
    result = bnp.compare(risk, P, curvature=("gauss_newton", "hessian", "fisher_empirical"))
    assert {k.dtype for pair in result.network.values() for k in pair} == {"float64"}
    assert risk.space.dtype == torch.float32
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    dense = bnp.hessian(risk.to(torch.float64)).to_dense()
    assert result.network["hessian"][0].negative == int((torch.linalg.eigvalsh(dense) < -1e-12).sum())


def test_a_network_without_curvature_keeps_its_table(problem):
    _, x, _ = problem
    model = bnp.models.mlp([5, 6, 3], dtype=torch.float64)
    with torch.no_grad():
        model.fc1.bias.fill_(-1e4)
        model.fc2.weight.zero_()
        model.fc2.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    result = bnp.compare(bnp.EmpiricalRisk(model, cross_entropy, (x, torch.zeros(60, dtype=torch.long))))
    assert result.network["gauss_newton"] == (None, None)
    assert result.layers.layers[0].inputs.two_sided
    assert "-" in str(result)


def test_results_survive_a_file_and_make_tables(problem, tmp_path):
    model, x, y = problem
    result = bnp.compare(bnp.EmpiricalRisk(model, cross_entropy, (x, y)))
    result.save(tmp_path / "c.json")
    assert bnp.results.Result.load(tmp_path / "c.json") == result
    frame = result.to_dataframe()
    assert list(frame["layer"]) == ["fc1", "fc2", "whole network", "whole network"]
    assert "<table" in result._repr_html_()
    assert "gauss_newton" in str(result)


def test_tables_are_numbers_that_sort_and_words_that_print(problem):
    model, x, y = problem
    result = bnp.compare(bnp.EmpiricalRisk(model, cross_entropy, (x, y)), profiles=True)
    frame = result.layers.to_dataframe()
    row = result.layers.layers[0]
    for name in ("value", "lower", "upper", "value_with_P", "gain", "gain_lower", "inputs", "units_worst_with_P"):
        assert frame[name].dtype == float
    assert frame["two_sided"].dtype == bool
    assert frame.sort_values("gain")["gain"].is_monotonic_increasing
    assert frame["value"][0] == row.block.value
    assert frame["gain"][0] == row.block.value / row.block_with_P.value
    assert frame["gain_lower"][0] <= frame["gain"][0] <= frame["gain_upper"][0]
    assert frame["units_worst"][0] == max(k.value for k in row.unit_blocks if k is not None)
    text = str(result.layers)
    for word in ("k(G^)", "gain", cell(row.block), "R: rows", "m: input features", "dead: units"):
        assert word in text
    assert cell(row.block) in result.layers._repr_html_()
    assert "\n" not in repr(result)
    # The whole network: its ranks, and both bounds of every one.
    whole = result.to_dataframe().query("layer == 'whole network' and rank == 5 and matrix == 'gauss_newton'")
    A = bnp.gauss_newton(bnp.EmpiricalRisk(model, cross_entropy, (x, y))).to_dense()
    sizes = torch.linalg.eigvalsh(A).flip(0)
    assert whole["value"].item() == pytest.approx(float(sizes[0] / sizes[4]), rel=1e-6)
    assert bool(whole["two_sided"].item())
    assert whole["gain"].item() == pytest.approx(whole["value"].item() / whole["value_with_P"].item())


def test_gains_of_one_sided_numbers_are_bounds():
    low = bnp.condition_number(bnp.DenseOperator(torch.diag(torch.tensor([4.0, 2.0, 1.0]).double())))
    half = bnp.condition_number(
        bnp.DenseOperator(torch.ones(3, 3, dtype=torch.float64) + torch.diag(torch.tensor([1.0, 0, 0])).double())
    )
    assert ratio(gain(low, low)) == "1"
    assert not half.two_sided
    assert ratio(gain(half, low)) == f">={half.lower / low.upper:.3g}"
    assert ratio(gain(low, half)) == f"<={low.upper / half.lower:.3g}"
    assert ratio(gain(half, half)) == ratio(gain(None, low)) == "-"


def test_bad_names_are_refused_with_what_there_is(problem):
    model, x, y = problem
    risk = bnp.EmpiricalRisk(model, cross_entropy, (x, y))
    with pytest.raises(bnp.errors.InvalidInputError, match="fc1, fc2"):
        bnp.layer_table(risk, layers=["fc9"])
    with pytest.raises(bnp.errors.InvalidInputError, match="layers is empty; leave it out for every layer"):
        bnp.layer_table(risk, layers=[])
    with pytest.raises(bnp.errors.InvalidInputError, match="unknown curvature 'hesian'; there are: gauss_newton, "):
        bnp.diagnose.curvature_matrix(risk, "hesian")
    with pytest.raises(bnp.errors.InvalidInputError, match="gauss_newton"):
        bnp.compare(risk, curvature=["hesian"])


@pytest.mark.parametrize("name", ["gauss_newton", "gauss-newton", "fisher_mc", "fisher-mc"])
def test_a_curvature_has_one_name_everywhere(problem, name):
    """With an underscore; a hyphen, as on command lines, is taken for one."""
    model, x, y = problem
    risk, known = bnp.EmpiricalRisk(model, cross_entropy, (x, y)), name.replace("-", "_")
    assert [*bnp.compare(risk, curvature=name, layers=["fc2"]).network] == [known]
    assert bnp.condition(risk, curvature=name, block="fc2").settings["curvature"] == known
    assert bnp.block_spectra(risk, curvature=name, blocks=["fc2"]).settings["curvature"] == known
    assert bnp.diagnose.curvature_matrix(risk, name).dim == risk.space.dim
    assert bnp.null_directions(risk, block="fc2", curvature=name).basis.shape[0] > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert bnp.SharpnessTracker(model, cross_entropy, (x, y), optimizer, curvature=name)


def test_unknown_matrices_are_refused_before_anything_is_measured(problem):
    model, x, y = problem
    measured = []
    with pytest.raises(InvalidInputError, match=r"unknown curvature 'Hesian', 'fischer'; there are: gauss_newton, "):
        bnp.compare(
            bnp.EmpiricalRisk(model, cross_entropy, (x, y)),
            curvature=["hessian", "Hesian", "fischer"],
            progress=lambda done, total: measured.append(done),
        )
    assert not measured


def test_one_sided_numbers_are_marked():
    A = bnp.DenseOperator(torch.ones(3, 3, dtype=torch.float64) + torch.diag(torch.tensor([1.0, 0, 0])).double())
    k = bnp.condition_number(A)
    assert cell(k).startswith(">=")
    assert spread([k, None]).startswith(">=")
    assert spread([None]) == "-"


def test_regression_network_with_bare_linear_root(generator):
    x, y = torch.rand(20, 3, generator=generator), torch.rand(20, 1, generator=generator)
    result = bnp.compare(bnp.EmpiricalRisk(nn.Linear(3, 1), mse_loss, (x, y)))
    plain, conditioned = result.network["gauss_newton"]
    assert plain.two_sided
    assert conditioned.value < plain.value


def test_a_row_still_answers_to_the_words_of_its_table() -> None:
    x, y = torch.arange(12.0, dtype=torch.float64).reshape(6, 2).sin(), torch.arange(6) % 2
    table = bnp.layer_table(
        bnp.EmpiricalRisk(torch.nn.Linear(2, 2).double(), torch.nn.functional.cross_entropy, (x, y))
    )
    (row,), (words,) = table.records(), table.cells()
    inputs = [f"{k.value:.3g}" for k in (table.layers[0].inputs, table.layers[0].centered, table.layers[0].normalized)]
    numbers = f"kappa(H^) {' -> '.join(inputs)}; block {words['layer k*']} -> {words['layer k* with P']}"
    assert table.layers[0].summary() == f"Linear: R 6, m 2, {numbers}"
    assert row["layer k*"] == words["layer k*"]
    assert "layer k*" not in row
    with pytest.raises(KeyError):
        row["nothing"]
