"""`P P^T` of an optimizer is what it multiplies a gradient by; what is no such map is refused in words.

Bugs that only these tests catch: pairs of L-BFGS in the wrong order, a factor of the product form that is not the
update's root, parameters in another order than the optimizer flattens them, a Kronecker factor along the wrong
dimension, SOAP's bias correction or eps at the wrong place, a state that is empty read as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from precondition_networks import network
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import ParameterSpace
from bnp_analysis.precondition import KroneckerRoots, LBFGSBlock
from bnp_analysis.testing import check_preconditioner, random_orthogonal, spectrum, symmetric_with_spectrum


def pairs_of(H: Tensor, count: int, g: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    steps = torch.randn(count, len(H), dtype=torch.float64, generator=g)
    return [(s, H @ s) for s in steps]


def two_loops(pairs: list[tuple[Tensor, Tensor]], gamma: float, q: Tensor) -> Tensor:
    """Nocedal's recursion, as torch has it."""
    kept = []
    for s, y in reversed(pairs):
        a = s @ q / (y @ s)
        q = q - a * y
        kept.append(a)
    q = gamma * q
    for (s, y), a in zip(pairs, reversed(kept), strict=True):
        q = q + (a - y @ q / (y @ s)) * s
    return q


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_product_form_is_the_two_loop_recursion(count: int, generator: torch.Generator) -> None:
    H = symmetric_with_spectrum(spectrum("log", 6, 1e4), generator).operator.to_dense()
    pairs = pairs_of(H, count, generator)
    P = LBFGSBlock(pairs, 0.3)
    v = torch.randn(6, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(P.direction(v), two_loops(pairs, 0.3, v), rtol=1e-8, atol=1e-12)
    s, y = pairs[-1]
    torch.testing.assert_close(P.direction(y), s, rtol=1e-9, atol=1e-12)  # the secant equation


def test_the_blocks_obey_the_laws(generator: torch.Generator) -> None:
    H = symmetric_with_spectrum(spectrum("log", 5, 30.0), generator).operator.to_dense()
    check_preconditioner(LBFGSBlock(pairs_of(H, 3, generator), 2.0), generator)
    factors = [random_orthogonal(n, generator) @ torch.diag(1 + torch.arange(n).double()) for n in (2, 3, 4)]
    scales = 1 + torch.rand(24, dtype=torch.float64, generator=generator)
    check_preconditioner(KroneckerRoots(factors, scales), generator)
    P = KroneckerRoots(factors)
    torch.testing.assert_close(P.to_dense(), torch.kron(torch.kron(factors[0], factors[1]), factors[2]))


def test_a_pair_without_curvature_is_refused() -> None:
    s = torch.tensor([1.0, 0.0])
    with pytest.raises(InvalidInputError, match=r"s\.y = -1"):
        LBFGSBlock([(s, -s)], 1.0)
    with pytest.raises(InvalidInputError, match="positive and finite"):
        LBFGSBlock([(s, s)], 0.0)


def risk_of(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> bnp.EmpiricalRisk:
    return bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y), **options)


def test_lbfgs_takes_the_step_that_its_map_says() -> None:
    """Torch's own next direction is the oracle; parameters are given in another order than the model's."""
    model, x, y = network("dense")
    parameters = list(model.parameters())[::-1]
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=6, tolerance_grad=0, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y)
        value.backward()
        return value

    optimizer.step(closure)
    state = optimizer.state[parameters[0]]
    P = bnp.optimizer_preconditioner(optimizer, model)
    before = state["prev_flat_grad"]  # the gradient of the last direction d
    named = dict(model.named_parameters())
    split = dict(zip(map(id, parameters), before.split([p.numel() for p in parameters]), strict=True))
    gradient = torch.cat([split[id(p)] for p in named.values()])
    moved = dict(zip(map(id, parameters), state["d"].split([p.numel() for p in parameters]), strict=True))
    direction = torch.cat([moved[id(p)] for p in named.values()])
    torch.testing.assert_close(P.direction(gradient), -direction, rtol=1e-6, atol=1e-9)
    risk = risk_of(model, x, y)
    assert bnp.optimizer_preconditioner(optimizer, model, space=risk).dim == risk.space.dim
    with pytest.raises(InvalidInputError, match="couples all its parameters"):
        bnp.optimizer_preconditioner(optimizer, model, space=risk.space.restrict(["0.weight"]))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.9)),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
)
def test_the_adaptive_ones_are_those_of_the_diagonal_preconditioner(make: Callable[[Any], Any]) -> None:
    model, x, y = network("dense")
    optimizer = make(model.parameters())
    with pytest.raises(InvalidInputError, match="made no step"):
        bnp.optimizer_preconditioner(optimizer, model)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    P = bnp.optimizer_preconditioner(optimizer, model)
    expected = bnp.diagonal_preconditioner(risk_of(model, x, y), optimizer, model=model)
    assert torch.equal(P.to_dense(), expected.to_dense())


def test_sgd_is_the_identity_and_needs_no_step() -> None:
    model, *_ = network("dense")
    P = bnp.optimizer_preconditioner(torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), model)
    assert torch.equal(P.to_dense(), torch.eye(P.dim, dtype=torch.float64))


def test_what_is_no_fixed_map_is_refused_in_words() -> None:
    model, *_ = network("dense")
    weights = [p for p in model.parameters() if p.ndim == 2]
    with pytest.raises(InvalidInputError, match="no linear map"):
        bnp.optimizer_preconditioner(torch.optim.Muon(weights), model)
    with pytest.raises(InvalidInputError, match=r"Adadelta .* is not known here"):
        bnp.optimizer_preconditioner(torch.optim.Adadelta(model.parameters()), model)
    with pytest.raises(InvalidInputError, match="fewer than two iterations"):
        bnp.optimizer_preconditioner(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(InvalidInputError, match="give model="):
        bnp.optimizer_preconditioner(torch.optim.SGD(model.parameters()))
    adam = torch.optim.Adam(model.parameters())
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    adam.step()
    other = ParameterSpace({"0.weight": (2, 2)}, torch.float64)
    with pytest.raises(InvalidInputError, match="different models"):
        bnp.optimizer_preconditioner(adam, model, space=other)


def foreign() -> ModuleType:
    """The package whose optimizers these are; an extra."""
    return pytest.importorskip("pytorch_optimizer")


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("name", ["Shampoo", "SOAP"])
def test_shampoo_and_soap_take_the_step_that_their_map_says(name: str, kind: str) -> None:
    settings: dict[str, Any] = {"Shampoo": {"matrix_eps": 1e-2}, "SOAP": {"betas": (0.0, 0.9), "eps": 1e-3}}[name]
    if name == "SOAP":
        settings |= {"weight_decay": 0.0, "precondition_frequency": 1000}
    model, x, y = network(kind)
    optimizer = getattr(foreign(), name)(model.parameters(), lr=1e-2, **settings)
    with pytest.raises(InvalidInputError, match="made no step"):
        bnp.optimizer_preconditioner(optimizer, model)
    risk = risk_of(model, x, y)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = risk.space.flatten([p.grad.clone() for p in model.parameters()])
        before = risk.space.flatten([p.detach().clone() for p in model.parameters()])
        optimizer.step()
    step = risk.space.flatten([p.detach() for p in model.parameters()]) - before
    P = bnp.optimizer_preconditioner(optimizer, model)
    torch.testing.assert_close(-1e-2 * P.direction(gradient), step, rtol=1e-5, atol=1e-9)
    check_preconditioner(P, torch.Generator().manual_seed(0))


class Shampoo(torch.optim.Optimizer):
    """A stand-in with the state of the package's: the formula of Gupta, Koren and Singer for one step."""

    __module__ = "pytorch_optimizer.optimizer.shampoo"

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            G, moved = p.grad, p.grad
            for i in range(p.ndim):
                rows = G.movedim(i, 0).reshape(p.shape[i], -1)
                values, vectors = torch.linalg.eigh(rows @ rows.T + 0.1 * torch.eye(p.shape[i], dtype=p.dtype))
                inverse = (vectors * values ** (-0.5 / p.ndim)) @ vectors.T
                self.state[p][f"inv_pre_cond_{i}"] = inverse
                moved = torch.tensordot(inverse, moved.movedim(i, 0), 1).movedim(0, i)
            p.sub_(moved, alpha=self.param_groups[0]["lr"])


def test_shampoos_state_is_read_without_the_package() -> None:
    model, x, y = network("conv")
    optimizer = Shampoo(model.parameters(), lr=0.5)
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.step()
    P = bnp.optimizer_preconditioner(optimizer, model)
    step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    torch.testing.assert_close(-0.5 * P.direction(gradient), step, rtol=1e-8, atol=1e-12)


def test_states_of_shampoo_that_are_no_map_are_refused() -> None:
    model, x, y = network("dense")
    optimizer = Shampoo(model.parameters(), lr=0.5)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    kept = state["inv_pre_cond_1"]
    state["inv_pre_cond_1"] = kept - 2 * torch.linalg.eigvalsh(kept)[-1] * torch.eye(len(kept), dtype=kept.dtype)
    with pytest.raises(
        InvalidInputError, match=r"not positive definite: its eigenvalues run from -.*larger matrix_eps"
    ):
        bnp.optimizer_preconditioner(optimizer, model)
    state["inv_pre_cond_1"] = torch.zeros_like(kept)  # as before the first step at which it is computed
    assert bnp.optimizer_preconditioner(optimizer, model).uncovered == {"0.weight": "the optimizer has not stepped it"}


class SOAP(torch.optim.Optimizer):
    """A stand-in with a state like that of the package's."""

    __module__ = "pytorch_optimizer.optimizer.soap"

    def __init__(self, parameters: Any, **settings: Any) -> None:
        usual = {"normalize_gradient": False, "merge_dims": False, "betas": (0.9, 0.75), "correct_bias": True, "eps": 0}
        super().__init__(parameters, usual | {"step": 2} | settings)


def merged(**settings: Any) -> tuple[nn.Module, SOAP, list[Tensor], Tensor]:
    """A tensor of three dimensions, two of them merged; its factors, and the diagonal between them."""
    g = torch.Generator().manual_seed(0)
    model = nn.ParameterDict({"w": torch.zeros(2, 3, 2, 1, dtype=torch.float64)})
    optimizer = SOAP(model.parameters(), **settings)
    Q = [random_orthogonal(n, g) for n in (2, 6)]
    square = 1 + torch.rand(2, 6, dtype=torch.float64, generator=g)
    optimizer.state[model["w"]].update({"Q": Q, "exp_avg_sq": square})
    return model, optimizer, Q, square


def test_soap_may_merge_dimensions() -> None:
    """After one step that counts `v_hat = v / (1 - beta_2)`, and `P P^T = Q diag(v_hat^(-1/2)) Q^T`."""
    model, optimizer, Q, square = merged(merge_dims=True)
    P = bnp.optimizer_preconditioner(optimizer, model).to_dense()
    both = torch.kron(*Q)
    torch.testing.assert_close(P @ P.T, both @ torch.diag((square / 0.25).flatten().rsqrt()) @ both.T)


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({"normalize_gradient": True}, {}, r"divides each step by its own length: that is no linear map"),
        ({"step": 1}, {}, r"made no step.*SOAP's first step only initializes"),
        ({}, {"Q": None}, r"made no step"),
        ({}, {"exp_avg_sq": torch.zeros(2, 6)}, r"divides by zero: a direction without gradient and eps = 0"),
        ({}, {"Q": [torch.eye(3), torch.eye(6)]}, r"merged dimensions in a way that its state does not tell"),
    ],
)
def test_states_of_soap_that_are_no_map_are_refused(settings: dict[str, Any], change: Any, said: str) -> None:
    model, optimizer, *_ = merged(merge_dims=True, **settings)
    optimizer.state[model["w"]].update(change)
    with pytest.raises(InvalidInputError, match=said):
        bnp.optimizer_preconditioner(optimizer, model)


def test_soap_that_merges_in_another_layout_is_refused() -> None:
    model, optimizer, *_ = merged(merge_dims=True)
    optimizer.data_format = "channels_last"
    with pytest.raises(
        InvalidInputError, match="SOAP with merge_dims and data_format='channels_last' is not read here"
    ):
        bnp.optimizer_preconditioner(optimizer, model)


def test_a_singular_factor_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match=r"singular to rounding: its singular values run from 3 to 0.*larger eps"
    ):
        KroneckerRoots([torch.eye(2), torch.diag(torch.tensor([3.0, 0.0]))])


@pytest.mark.parametrize("count", [1, 7])
def test_rounding_of_the_product_form_is_within_what_it_says(count: int, generator: torch.Generator) -> None:
    """In float32, against the sizes that `absolute` adds up; every pair adds a product and a difference."""
    H = symmetric_with_spectrum(spectrum("log", 6, 1e3), generator).operator.to_dense()
    pairs = pairs_of(H, count, generator)
    exact, P = LBFGSBlock(pairs, 0.3), LBFGSBlock(pairs, 0.3, dtype=torch.float32)
    v = torch.randn(6, dtype=torch.float32, generator=generator)
    off = (P.apply(v).double() - exact.apply(v.double())).abs()
    sizes = P.absolute() @ v.abs()
    assert P.roundings == count * (6 + 4) + 2
    assert bool((off <= P.roundings * torch.finfo(torch.float32).eps / 2 * sizes).all())


def test_parameters_outside_of_the_space_are_passed_over() -> None:
    model, x, y = network("dense")
    adam = torch.optim.Adam(model.parameters())
    nn.functional.cross_entropy(model(x), y).backward()
    adam.step()
    risk = risk_of(model, x, y)
    whole, part = (bnp.optimizer_preconditioner(adam, model, space=s) for s in (risk, risk.space.restrict(["0.bias"])))
    assert part.uncovered == {}
    assert torch.equal(part.to_dense(), whole.block("0.bias").to_dense())
    adam.state[model[0].bias]["exp_avg_sq"][0] = math.nan
    with pytest.raises(InvalidInputError, match="divisors have NaN or infinite entries: the optimizer's state"):
        bnp.optimizer_preconditioner(adam, model)


def test_a_report_of_p_itself() -> None:
    H = torch.diag(torch.tensor([16.0, 4.0, 1.0], dtype=torch.float64))
    A = bnp.DenseOperator(H)
    best = bnp.linalg.DensePreconditioner(torch.diag(H.diagonal().rsqrt()))
    found = bnp.diagnose.preconditioner_report(best, A)
    assert found.cosine == pytest.approx(1.0)
    assert found.condition.value == pytest.approx(4.0)
    assert found.stable_rank == pytest.approx((1 / 16 + 1 / 4 + 1) / 1)
    identity = bnp.diagnose.preconditioner_report(bnp.linalg.IdentityPreconditioner(3, torch.float64), A)
    inverse = 1 / H.diagonal()
    assert identity.cosine == pytest.approx(float(inverse.sum() / (math.sqrt(3) * inverse.norm())))
    assert "cosine" in str(identity)
    assert bnp.diagnose.preconditioner_report(best).cosine is None


def test_a_report_refuses_a_curvature_that_has_no_positive_inverse() -> None:
    P = bnp.linalg.IdentityPreconditioner(2, torch.float64)
    for values, message in (([1.0, -0.5], "negative eigenvalue"), ([1.0, 0.0], "damping=")):
        A = bnp.DenseOperator(torch.diag(torch.tensor(values, dtype=torch.float64)))
        with pytest.raises(ValueError, match=message):
            bnp.diagnose.preconditioner_report(P, A)
    singular = bnp.DenseOperator(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    assert 0 < (bnp.diagnose.preconditioner_report(P, singular, damping=1e-2).cosine or 0) < 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, Shampoo])
def test_rates_of_groups_are_part_of_the_map(kind: Any) -> None:
    model, x, y = network("dense")
    optimizer = kind(model.parameters(), lr=0.5)
    first, *others = optimizer.param_groups[0]["params"]
    if kind is Shampoo:  # the stand-in steps its first group only
        optimizer.param_groups[0]["params"] = others
        optimizer.state[first] = {
            f"inv_pre_cond_{i}": torch.eye(n, dtype=first.dtype) for i, n in enumerate(first.shape)
        }
        optimizer.param_groups.append({"params": [first], "lr": 0.125})
    else:
        optimizer.param_groups[0]["params"] = [first]
        optimizer.add_param_group({"params": others, "lr": 0.125})
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    if kind is Shampoo:
        step[: first.numel()] = -0.125 * gradient[: first.numel()]
    P = bnp.optimizer_preconditioner(optimizer, model)
    torch.testing.assert_close(-0.5 * P.direction(gradient), step, rtol=1e-8, atol=1e-12)


def test_a_parameter_without_a_rate_is_named() -> None:
    model, *_ = network("dense")
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": others}], lr=0.1)
    P = bnp.optimizer_preconditioner(optimizer, model)
    assert list(P.uncovered.values()) == ["its learning rate is zero"]
    assert bool((P.to_dense() == torch.eye(P.dim)).all())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_steps_along_the_gradient_and_steps_of_ones_own_are_refused(kind: Any) -> None:
    class Signs(kind):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.sign(), alpha=0.1)

    class Renamed(kind):
        """A class without a step of its own is its parent's."""

    model, x, y = network("dense")
    nn.functional.cross_entropy(model(x), y).backward()
    climbs, signs, renamed = (make(model.parameters(), lr=0.1) for make in (kind, Signs, Renamed))
    climbs.param_groups[0]["maximize"] = True
    for optimizer, words in ((climbs, "maximize"), (signs, "not known")):
        optimizer.step()
        with pytest.raises(InvalidInputError, match=words):
            bnp.optimizer_preconditioner(optimizer, model)
    renamed.step()
    assert bnp.optimizer_preconditioner(renamed, model).dim == sum(p.numel() for p in model.parameters())
