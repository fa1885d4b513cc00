"""K-FAC's blocks are the Kronecker products they claim to be, exact where the two factors are independent.

Bugs that only these tests catch: factors in the wrong order or on the wrong side (weights are row-major, the bias is
torch's last), an output factor averaged over positions instead of summed, examples of a coupled network mixed in one
backward pass, an activation that works in place and overwrites what is differentiated, a group with another group's
statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from precondition_networks import classification, one_layer, relative, uneven
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import coverage, layer_rows
from bnp_analysis.precondition import KroneckerBlock, kfac_preconditioner
from bnp_analysis.precondition.kronecker import output_moments


def squares(output: Tensor, target: Any) -> Tensor:
    return output.square().mean()


def whitened(risk: bnp.EmpiricalRisk, **options: Any) -> Tensor:
    P = kfac_preconditioner(risk, **options)
    return bnp.linalg.congruence(bnp.gauss_newton(risk), P).to_dense()


EXACT: dict[str, Callable[[bool], nn.Module]] = {
    "dense": lambda bias: nn.Linear(4, 3, bias),
    "sequence": lambda bias: nn.Linear(4, 3, bias),
    "conv": lambda bias: nn.Conv2d(2, 3, 2, padding=1, bias=bias),
    "stride": lambda bias: nn.Conv2d(2, 2, (2, 3), stride=2, dilation=(1, 2), padding=1, bias=bias),
    "groups": lambda bias: nn.Conv2d(4, 4, 2, groups=2, bias=bias),
    "1d": lambda bias: nn.Conv1d(3, 2, 2, bias=bias),
    "3d": lambda bias: nn.Conv3d(1, 2, 2, bias=bias),
}
SHAPES = {
    "dense": (20, 4),
    "sequence": (5, 6, 4),
    "conv": (7, 2, 4, 4),
    "stride": (9, 2, 6, 7),
    "groups": (8, 4, 4, 4),
    "1d": (8, 3, 5),
    "3d": (5, 1, 4, 4, 4),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", EXACT)
def test_it_whitens_a_linear_network_with_squared_loss(kind: str, bias: bool) -> None:
    """There `S` is a multiple of I for every row, and the Gauss-Newton matrix is `S (x) A` exactly."""
    x = uneven(SHAPES[kind], 4, axis=-1 if kind in ("dense", "sequence") else 1)
    risk = bnp.EmpiricalRisk(EXACT[kind](bias).double(), squares, (x, torch.zeros(x.shape[0])))
    found = whitened(risk, damping=0)
    torch.testing.assert_close(found, torch.eye(found.shape[0], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("coupling", ["dense", "correlated"])
def test_both_factors_of_a_deep_layer(coupling: str) -> None:
    """A linear head behind the layer: `S = 2 W W^T / n` couples the units, and the block is still a product."""
    x = uneven((20, 4), 4)
    if coupling == "correlated":
        x = x @ torch.tril(torch.ones(4, 4, dtype=torch.float64))
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).double()
    risk = bnp.EmpiricalRisk(model, squares, (x, torch.zeros(20)))
    S = output_moments(risk, coverage(risk))["0"][0]
    W = model[1].weight.detach()
    torch.testing.assert_close(S, 2 * W.T @ W / 5)
    P = kfac_preconditioner(risk, damping=0, block="0")
    found = bnp.linalg.congruence(bnp.gauss_newton(risk, block="0"), P).to_dense()
    torch.testing.assert_close(found, torch.eye(15, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_block_is_the_kronecker_product_in_torchs_order() -> None:
    g = torch.Generator().manual_seed(0)
    A, S = (
        (rows := torch.randn(9, n, dtype=torch.float64, generator=g)).T @ rows
        for n in (4, 3)
    )  # fmt: skip
    P = KroneckerBlock(A[None], S[None], bias=True).to_dense()

    def inverse_root(M: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(M)
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T

    product = torch.kron(inverse_root(S), inverse_root(A))
    # The rows of units [weights, bias] in torch's order: all weights, then all biases.
    order = torch.arange(12).view(3, 4)
    order = torch.cat([order[:, :3].flatten(), order[:, 3]])
    assert relative(P, product[order][:, order]) < 1e-12
    assert relative(P @ P, torch.linalg.inv(torch.kron(S, A))[order][:, order]) < 1e-10


def moments_by_definition(risk: bnp.EmpiricalRisk, name: str) -> Tensor:
    """`S` from dense derivatives: the Gauss-Newton matrix of what is added to the layer's output, summed over rows."""
    layer = dict(risk.modules())[name]
    total: Any = 0
    for batch in risk.batches:
        shapes: list[torch.Size] = []

        def run(delta: Tensor | float, batch: Any = batch, shapes: list[torch.Size] = shapes) -> Tensor:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                shapes.append(output.shape)
                return output + delta

            handle = layer.register_forward_hook(hook)
            try:
                return risk.batch_outputs(risk.named_tensors(), batch)
            finally:
                handle.remove()

        outputs = run(0.0)
        zeros = torch.zeros(shapes[0], dtype=torch.float64)
        J = torch.autograd.functional.jacobian(run, zeros).reshape(outputs.numel(), *shapes[0])
        H = torch.autograd.functional.hessian(lambda o, b=batch: risk.batch_loss(o, b), outputs)
        if not isinstance(layer, nn.Linear):
            J = J.movedim(2, -1)
        J = J.reshape(outputs.numel(), -1, J.shape[-1])
        H = H.reshape(outputs.numel(), outputs.numel())
        total = total + batch.count / risk.batches.total * torch.einsum("ori,op,prj->ij", J, H, J)
    return total


def cases() -> dict[str, bnp.EmpiricalRisk]:
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    y = torch.arange(6) % 3
    entropy = nn.functional.cross_entropy

    def tokens(output: Tensor, target: Tensor) -> Tensor:
        return entropy(output.reshape(-1, 3), target.repeat_interleave(2))

    class Mixing(nn.Module):
        """Its examples' tokens depend on each other, and its outputs are a list of tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.inner(x))
            return self.outer(h * h.flip(1)).flatten(0, 1)

    torch.manual_seed(5)
    dense = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    in_place = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    conv = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    coupled = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).double()
    return {
        "dense": bnp.EmpiricalRisk(dense, entropy, (draw(6, 4), y)),
        "uneven batches": bnp.EmpiricalRisk(dense, entropy, [(draw(1, 4), y[:1]), (draw(5, 4), y[1:])]),
        "in place": bnp.EmpiricalRisk(in_place, entropy, (draw(6, 4), y)),
        "convolution": bnp.EmpiricalRisk(conv, entropy, (draw(6, 2, 3, 3), y)),
        "batch coupled": bnp.EmpiricalRisk(coupled, entropy, (draw(6, 4), y)),
        "tokens in a list": bnp.EmpiricalRisk(Mixing().double(), tokens, (draw(6, 2, 4), y)),
    }


@pytest.fixture(scope="module")
def risks() -> dict[str, bnp.EmpiricalRisk]:
    with torch.random.fork_rng():
        return cases()


NAMES = ("dense", "uneven batches", "in place", "convolution", "batch coupled", "tokens in a list")


@pytest.mark.parametrize("case", NAMES)
def test_the_output_factor_is_its_definition(case: str, risks: dict[str, bnp.EmpiricalRisk]) -> None:
    risk = risks[case]
    found = output_moments(risk, coverage(risk))
    assert len(found) == 2
    for name, S in found.items():
        assert S.shape[0] == 1
        torch.testing.assert_close(S[0], moments_by_definition(risk, name), rtol=1e-9, atol=1e-12)


def test_a_batch_that_a_layer_does_not_see_adds_nothing() -> None:
    class Either(nn.Module):
        """The first layer for four features, the second for five."""

        def __init__(self) -> None:
            super().__init__()
            self.four, self.five = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.four(x) if x.shape[1] == 4 else self.five(x)

    model, entropy, y = Either().double(), nn.functional.cross_entropy, torch.arange(6) % 3
    batches = [(uneven((2, 4), 1), y[:2]), (uneven((4, 5), 2), y[2:])]
    first = ["four.weight", "four.bias"]
    seen = bnp.EmpiricalRisk(model, entropy, batches[:1], params=first)
    expected = output_moments(seen, coverage(seen))["four"] / 3
    for risk in (bnp.EmpiricalRisk(model, entropy, batches, params=first), bnp.EmpiricalRisk(model, entropy, batches)):
        torch.testing.assert_close(output_moments(risk, coverage(risk))["four"], expected, rtol=1e-12, atol=0)


def test_groups_have_their_own_factors() -> None:
    """A grouped convolution is damped and factored group by group, as if each were a layer of its own."""
    x = uneven((8, 4, 4, 4), 2)
    whole = nn.Conv2d(4, 4, 2, groups=2).double()
    risk = bnp.EmpiricalRisk(whole, squares, (x, torch.zeros(8)))
    P = kfac_preconditioner(risk).to_dense()
    for group in range(2):
        part = nn.Conv2d(2, 2, 2).double()
        alone = bnp.EmpiricalRisk(
            part, lambda o, y: squares(o, y) / 2, (x[:, 2 * group : 2 * group + 2], torch.zeros(8))
        )
        index = torch.cat([torch.arange(16) + 16 * group, torch.tensor([32, 33]) + 2 * group])
        assert relative(P[index][:, index], kfac_preconditioner(alone).to_dense()) < 1e-10


def test_factored_damping() -> None:
    """`A + damping tr(A)/d I` and the same for `S`."""
    risk = classification("dense")
    layer = coverage(risk)["2"]
    h = layer_rows(risk)["2"][:, 0]
    h = torch.cat([h, h.new_ones(h.shape[0], 1)], dim=1)
    A, S = h.T @ h / h.shape[0], output_moments(risk, coverage(risk))["2"][0]
    damped = [M + 0.3 * M.trace() / M.shape[0] * torch.eye(M.shape[0], dtype=torch.float64) for M in (A, S)]
    expected = KroneckerBlock(damped[0][None], damped[1][None], bias=True)
    assert layer.units == 3
    assert relative(kfac_preconditioner(risk, damping=0.3, block="2").to_dense(), expected.to_dense()) < 1e-12


def test_the_scale_of_the_loss_and_of_the_inputs_only_scales_p() -> None:
    """Damping is relative: no absolute number decides."""
    x = uneven((20, 4), 1)
    plain = kfac_preconditioner(one_layer(x, 2, bias=False)).to_dense()
    tiny = kfac_preconditioner(one_layer(1e-6 * x, 2, bias=False)).to_dense()
    assert relative(1e-6 * tiny, plain) < 1e-9


def test_it_is_better_than_bnp_where_inputs_are_correlated() -> None:
    """BNP keeps the correlation of the inputs, K-FAC removes it: what the comparison is for."""
    x = uneven((60, 4), 1) @ (torch.ones(4, 4, dtype=torch.float64) + 0.1 * torch.eye(4, dtype=torch.float64))
    risk = one_layer(x, 2)
    A = bnp.gauss_newton(risk)
    plain, with_bnp, with_kfac = (
        bnp.condition_number(A, preconditioner=P).value
        for P in (None, bnp.bnp_preconditioner(risk), kfac_preconditioner(risk, damping=0))
    )
    assert with_kfac == pytest.approx(1.0, rel=1e-6)
    assert with_kfac < with_bnp / 100 < plain / 100


def test_layers_that_are_not_covered_are_named_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)).double()
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (uneven((9, 4), 1), torch.arange(9) % 3))
    P = kfac_preconditioner(risk)
    assert sorted(P.uncovered) == ["1.bias", "1.weight"]
    assert torch.equal(P.block("1").to_dense(), torch.eye(6, dtype=torch.float64))


def test_a_layer_without_curvature_or_input_gets_a_finite_block() -> None:
    """Dead units: `S = 0` for the first layer, `A = 0` for a second one without bias."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (uneven((9, 4), 1), torch.arange(9) % 3))
    dense = kfac_preconditioner(risk).to_dense()
    assert bool(torch.isfinite(dense).all())


def test_bad_input_is_refused() -> None:
    risk = classification("dense")
    for damping, words in ((-1.0, "at least 0"), (float("nan"), "a real number"), (float("inf"), "finite")):
        with pytest.raises(InvalidInputError, match=f"damping must be {words}"):
            kfac_preconditioner(risk, damping=damping)
    # Softmax: two of three directions at most, in every layer.
    with pytest.raises(InvalidInputError, match="layer '0': the output factor is singular"):
        kfac_preconditioner(risk, damping=0)
    constant = one_layer(torch.ones(5, 2, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="layer '': the input factor is singular"):
        kfac_preconditioner(constant, damping=0)
    data = (uneven((9, 4), 1), torch.zeros(9))
    norm = bnp.EmpiricalRisk(nn.LayerNorm(4).double(), squares, data)
    with pytest.raises(InvalidInputError, match="no layer that K-FAC covers"):
        kfac_preconditioner(norm)
    concave = bnp.EmpiricalRisk(
        nn.Linear(4, 2).double(), lambda o, y: -squares(o, y), (uneven((9, 4), 1), torch.zeros(9))
    )
    with pytest.raises(InvalidInputError, match="not convex in the outputs"):
        kfac_preconditioner(concave)
    with pytest.raises(InvalidInputError, match=r"must be \(groups, d, d\)"):
        KroneckerBlock(torch.eye(2), torch.eye(2), bias=False)
