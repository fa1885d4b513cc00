"""Output scaling (T10): each unit's block divided by the root of the curvature that the loss has in its pre-activation.

Bugs that only these tests catch: a scale of single examples' gradients in place of the Gauss-Newton diagonal, rows of
different examples or positions that cancel in one backward pass, batches weighed equally, positions of a convolution
averaged in place of summed, a scale put on the wrong units of a layer, `P diag(s)` for `P diag(1/s)`, a dead unit
divided by zero; and, beyond BNP's own formulas, a condition number that still moves along a ReLU network's symmetry.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from precondition_networks import classification, network, relative, uneven
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import coverage
from bnp_analysis.precondition import BNPBlock
from bnp_analysis.precondition.bnp import output_scales
from bnp_analysis.testing import check_preconditioner

Loss = Callable[[Tensor, Tensor], Tensor]


def dense_scales(model: nn.Module, name: str, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """`s` by its definition: dense `J^T S J` in perturbations added to the layer's outputs, forward mode and all."""
    layer = dict(model.named_modules())[name]
    shapes: list[torch.Size] = []

    def note(module: nn.Module, args: object, out: Tensor) -> None:
        shapes.append(out.shape)

    with layer.register_forward_hook(note), torch.no_grad():
        model(x)

    def outputs(flat: Tensor) -> Tensor:
        parts = iter(flat.split([shape.numel() for shape in shapes]))

        def add(module: nn.Module, args: object, out: Tensor) -> Tensor:
            return out + next(parts).view(out.shape)

        with layer.register_forward_hook(add):
            return model(x)

    zero = torch.zeros(sum(shape.numel() for shape in shapes), dtype=x.dtype)
    J = torch.func.jacrev(outputs)(zero).reshape(-1, zero.numel())
    z = outputs(zero).detach()
    S = torch.func.hessian(lambda flat: loss(flat.view(z.shape), y))(z.flatten())
    diagonal = (J * (S @ J)).sum(0)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    parts = zip(diagonal.split([shape.numel() for shape in shapes]), shapes, strict=True)
    total = sum(d.view(shape).movedim(axis, -1).reshape(-1, shape[axis]).sum(0) for d, shape in parts)
    return torch.as_tensor(total).detach().sqrt()


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, nn.functional.mse_loss], ids=["softmax", "squares"])
@pytest.mark.parametrize("kind", ["dense", "sequence", "groups", "3d"])
def test_it_is_the_root_of_the_summed_diagonal(kind: str, loss: Loss) -> None:
    model, x, labels = network(kind)
    y = labels if loss is nn.functional.cross_entropy else nn.functional.one_hot(labels, 3).double()
    risk = bnp.EmpiricalRisk(model, loss, (x, y))
    P = bnp.bnp_preconditioner(risk, output_scale=True)
    assert set(P.output_scales) == {layer.name for layer in coverage(risk)}
    for name, s in P.output_scales.items():
        assert relative(s, dense_scales(model, name, loss, x, y)) < 1e-12


def test_a_single_dense_layer_of_least_squares_has_the_same_scale_in_every_unit() -> None:
    """`l = |a - y|^2 / n`: `s_i = sqrt(2/n)`."""
    x = uneven((9, 4), 1)
    risk = bnp.EmpiricalRisk(nn.Linear(4, 3).double(), nn.functional.mse_loss, (x, torch.zeros(9, 3).double()))
    s = bnp.bnp_preconditioner(risk, output_scale=True).output_scales[""]
    torch.testing.assert_close(s, torch.full((3,), (2 / 3) ** 0.5, dtype=torch.float64), rtol=1e-14, atol=0)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.relu_(self.inner(x)))))


class Attention(nn.Module):
    """Positions that depend on each other, with a loss at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ x.mT, dim=-1)
        return self.head(torch.tanh(weights @ self.value(x)))


def by_position(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), y.flatten())


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


@pytest.mark.parametrize("name", ["inner", "head"])
def test_uses_of_a_layer_add_up(name: str) -> None:
    model, x, y = seeded(Reused), uneven((7, 5), 1), torch.arange(7) % 3
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    found = output_scales(risk, coverage(risk))[name]
    model.forward = lambda x: model.head(torch.tanh(model.inner(torch.relu(model.inner(x)))))  # type: ignore[method-assign]
    assert relative(found, dense_scales(model, name, nn.functional.cross_entropy, x, y)) < 1e-12


@pytest.mark.parametrize("name", ["value", "head"])
def test_positions_do_not_cancel(name: str) -> None:
    model, x, y = seeded(Attention), uneven((4, 5, 4), 1, axis=2), torch.arange(20).view(4, 5) % 3
    risk = bnp.EmpiricalRisk(model, by_position, (x, y))
    found = bnp.bnp_preconditioner(risk, output_scale=True).output_scales[name]
    assert relative(found, dense_scales(model, name, by_position, x, y)) < 1e-12


@pytest.mark.parametrize("name", ["0", "3"])
def test_examples_of_a_coupled_batch_do_not_cancel(name: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    x, y = uneven((6, 5), 1), torch.arange(6) % 3
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    assert risk.coupled
    found = output_scales(risk, coverage(risk))[name]
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    assert relative(found, dense_scales(model, name, nn.functional.cross_entropy, x, y)) < 1e-10


def test_batches_weigh_by_their_examples() -> None:
    model, x, y = network("padding")
    whole = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    split = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, [(x[:1], y[:1]), (x[1:], y[1:])])
    one, two = (output_scales(risk, coverage(risk)) for risk in (whole, split))
    for name, s in one.items():
        assert relative(two[name], s) < 1e-13


@pytest.mark.parametrize("kind", ["dense", "groups"])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_are_divided_by_unit(kind: str, bias: bool) -> None:
    risk = classification(kind, bias=bias)
    plain, scaled = (bnp.bnp_preconditioner(risk, output_scale=on) for on in (False, True))
    assert (plain.output_scales, plain.settings["output_scale"]) == ({}, False)
    assert scaled.settings["output_scale"]
    for layer in coverage(risk):
        for i, s in enumerate(scaled.output_scales[layer.name].tolist()):
            own = scaled.block((layer.name, i)).to_dense()
            assert relative(own, plain.block((layer.name, i)).to_dense() / s) < 1e-14
            positions = risk.space.indices((layer.name, i))
            torch.testing.assert_close(own, scaled.to_dense()[positions][:, positions], rtol=1e-14, atol=0)
    assert scaled.q == plain.q


@pytest.mark.parametrize("bias", [True, False])
def test_it_obeys_the_laws(bias: bool, generator: torch.Generator) -> None:
    P = bnp.bnp_preconditioner(classification("groups", bias=bias), output_scale=True)
    check_preconditioner(P, generator)
    check_preconditioner(P.block("0"), generator)
    single = P.to(torch.float32)
    check_preconditioner(single, generator)
    assert relative(single.to_dense().double(), P.to_dense()) < 1e-5
    assert torch.equal(single.to(torch.float64).to_dense(), P.to_dense()), "the scales keep their precision"


def test_a_unit_that_is_dead_gets_scale_one_and_is_listed() -> None:
    model, x, y = network("dense")
    model[1] = nn.ReLU()
    with torch.no_grad():
        model[0].bias[2] = -100.0
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    P = bnp.bnp_preconditioner(risk, output_scale=True)
    assert P.flat_units["0"] == (2,)
    assert P.flat_units["2"] == ()
    assert float(P.output_scales["0"][2]) == 1.0
    assert torch.equal(P.block(("0", 2)).to_dense(), bnp.bnp_preconditioner(risk).block(("0", 2)).to_dense())


def test_a_loss_without_a_root_is_refused() -> None:
    model, x, _ = network("dense")
    risk = bnp.EmpiricalRisk(model, lambda o, y: -o.square().mean(), (x, torch.zeros(len(x))))
    with pytest.raises(InvalidInputError, match="must be convex"):
        bnp.bnp_preconditioner(risk, output_scale=True)


def test_a_word_is_not_taken_for_true() -> None:
    model, x, y = network("dense")
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
    with pytest.raises(InvalidInputError, match="must be True or False"):
        bnp.bnp_preconditioner(risk, output_scale="none")  # type: ignore[call-overload]


def test_scales_that_do_not_fit_are_refused() -> None:
    def block(scales: Tensor) -> BNPBlock:
        return BNPBlock(torch.zeros(1, 2), torch.ones(1, 2), 1.0, units=3, bias=True, output_scales=scales)

    for scales in (torch.ones(2), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, torch.inf, 1.0])):
        with pytest.raises(InvalidInputError, match="3 positive and finite"):
            block(scales)
    with pytest.raises(InvalidInputError, match=r"in torch\.float32"):
        block(torch.tensor([1.0, 1e-200, 1.0], dtype=torch.float64))


# Along the rescaling orbit of ReLU units (T12)


@torch.no_grad()
def awake(model: nn.Module, x: Tensor) -> None:
    """Biases such that each pre-activation has mean 0: no unit is dead or always active."""
    for module in model.children():
        if isinstance(module, nn.Linear | nn.Conv2d):
            out = module(x)
            module.bias -= out.mean([d for d in range(out.ndim) if d != 1])
        x = module(x)


def perceptron() -> tuple[nn.Module, Tensor, Tensor]:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.LeakyReLU(0.1), nn.Linear(3, 3))
    )
    x = uneven((60, 4), 3)
    awake(model, x)
    return model, x, torch.arange(60) % 3


def rescale_perceptron(model: nn.Module, t: float) -> None:
    """One unit of each hidden layer, in opposite directions."""
    for first, i, second, factor in ((model[0], 1, model[2], t), (model[2], 0, model[4], 1 / t)):
        first.weight[i] *= factor
        first.bias[i] *= factor
        second.weight[:, i] /= factor


def convolutional() -> tuple[nn.Module, Tensor, Tensor]:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)))
    x = uneven((60, 1, 5, 5), 3)
    awake(model, x)
    return model, x, torch.arange(60) % 2


def rescale_convolutional(model: nn.Module, t: float) -> None:
    model[0].weight[1] *= t
    model[0].bias[1] *= t
    model[3].weight[:, 9:] /= t


ORBITS = {"perceptron": (perceptron, rescale_perceptron), "convolutional": (convolutional, rescale_convolutional)}
SCALES = (1e-3, 0.1, 1.0, 30.0, 1e3)


@pytest.mark.parametrize("case", ORBITS)
def test_the_condition_number_does_not_move_along_a_rescaling_orbit(case: str) -> None:
    """T10, T12: exactly constant with output scaling; plain BNP and no preconditioner move by orders of magnitude."""
    make, rescale = ORBITS[case]
    original, x, y = make()
    found: dict[str, list[float]] = {"none": [], "bnp": [], "scaled": []}
    for t in SCALES:
        model = copy.deepcopy(original)
        with torch.no_grad():
            rescale(model, t)
        risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
        A, null = bnp.gauss_newton(risk), bnp.null_directions(risk)
        forms = {"none": None, "bnp": bnp.bnp_preconditioner(risk)}
        forms["scaled"] = bnp.bnp_preconditioner(risk, output_scale=True)
        for name, P in forms.items():
            k = bnp.condition_number(A, preconditioner=P, null=null)
            assert k.unresolved == 0
            found[name].append(k.value)
    assert max(found["scaled"]) / min(found["scaled"]) - 1 < 1e-6
    for name in ("none", "bnp"):
        assert max(found[name]) > 1e3 * min(found[name])
    assert found["scaled"][2] < found["none"][2]
