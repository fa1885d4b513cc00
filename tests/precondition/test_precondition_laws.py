"""Every preconditioner is an invertible linear map, and its blocks are its own submatrices.

Bugs that only these tests catch: `solve` that inverts another map than `apply`, a transpose that forgets the order
of its factors (the rank-one form is not symmetric), an `absolute` below `|P|` or roundings that are not counted
(certificates would be too narrow), units dealt to the wrong group of a convolution, a block for a layer in another
order than the space, a conversion of dtype that forgets one of the stored tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from precondition_networks import classification, relative
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import ParameterSpace
from bnp_analysis.precondition import (
    BlockDiagonal,
    BNPBlock,
    DiagonalPreconditioner,
    KroneckerBlock,
    diagonal_preconditioner,
    identity_preconditioner,
    kfac_preconditioner,
)
from bnp_analysis.testing import check_preconditioner

Make = Callable[[torch.Generator], bnp.linalg.Preconditioner]


def moments(groups: int, features: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    mean = 3 * torch.randn(groups, features, dtype=torch.float64, generator=g)
    return mean, 10 ** torch.randn(groups, features, dtype=torch.float64, generator=g)


def bnp_block(groups: int, features: int, units: int, *, bias: bool) -> Make:
    return lambda g: BNPBlock(*moments(groups, features, g), 1.7, units=units, bias=bias)


def diagonal_form(g: torch.Generator) -> BNPBlock:
    mean, variance = moments(1, 4, g)
    return BNPBlock(torch.zeros_like(mean), variance, 2.0, units=3, bias=False)


def positive(groups: int, n: int, g: torch.Generator) -> Tensor:
    rows = torch.randn(groups, 2 * n, n, dtype=torch.float64, generator=g)
    return rows.mT @ rows


def gaps(g: torch.Generator) -> BlockDiagonal:
    """Blocks on scattered and on consecutive positions, with parameters between them that are left alone."""
    one = BNPBlock(*moments(1, 2, g), 1.0, units=1, bias=True)
    two = DiagonalPreconditioner(torch.tensor([2.0, 0.5], dtype=torch.float64))
    where = {"one": (torch.tensor([7, 1, 4]), one), "two": (torch.tensor([2, 3]), two)}
    return BlockDiagonal(9, where, torch.float64)


CASES: dict[str, Make] = {
    "with bias": bnp_block(1, 4, 3, bias=True),
    "with bias, groups": bnp_block(2, 3, 4, bias=True),
    "without bias": bnp_block(1, 4, 3, bias=False),
    "without bias, groups": bnp_block(2, 3, 4, bias=False),
    "without bias, diagonal": diagonal_form,
    "one feature": bnp_block(1, 1, 1, bias=True),
    "scattered blocks": gaps,
    "diagonal": lambda g: DiagonalPreconditioner(10 ** torch.randn(5, dtype=torch.float64, generator=g)),
    "kronecker": lambda g: KroneckerBlock(positive(1, 4, g), positive(1, 3, g), bias=True),
    "kronecker, groups": lambda g: KroneckerBlock(positive(2, 3, g), positive(2, 2, g), bias=True),
    "kronecker, groups, no bias": lambda g: KroneckerBlock(positive(2, 3, g), positive(2, 2, g), bias=False),
}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_block_obeys_the_laws(case: str, generator: torch.Generator) -> None:
    check_preconditioner(CASES[case](generator), generator)


@pytest.mark.parametrize("case", CASES)
def test_no_product_rounds_more_than_is_said(case: str, generator: torch.Generator) -> None:
    """`|fl(P^T g) - P^T g| <= roundings u |P|^T |g|` in float32, whose error float64 shows."""
    for _ in range(20):
        P = CASES[case](generator)
        single, size = P.to(torch.float32), P.absolute()
        g = torch.randn(P.dim, 30, generator=generator, dtype=torch.float64).float()
        gap = (single._rmatmat(g).double() - P._rmatmat(g.double())).abs()
        allowed = P.roundings * torch.finfo(torch.float32).eps / 2 * size._rmatmat(g.double().abs())
        assert bool((gap <= allowed).all())
        assert float((gap / allowed).max()) > 0.01, "a count so large says nothing"


def test_blocks_round_as_the_roughest_of_them(generator: torch.Generator) -> None:
    P = gaps(generator)
    assert P.roundings == max(block.roundings for _, block in P.blocks.values())
    assert identity_preconditioner(ParameterSpace({"w": (2,)})).roundings == 0


@pytest.mark.parametrize("kind", ["dense", "sequence", "groups"])
@pytest.mark.parametrize("bias", [True, False])
def test_bnp_of_a_network_obeys_the_laws(kind: str, bias: bool, generator: torch.Generator) -> None:
    check_preconditioner(bnp.bnp_preconditioner(classification(kind, bias=bias)), generator)


@pytest.mark.parametrize("kind", ["dense", "groups"])
def test_kfac_and_diagonal_of_a_network_obey_the_laws(kind: str, generator: torch.Generator) -> None:
    risk = classification(kind)
    check_preconditioner(kfac_preconditioner(risk), generator)
    check_preconditioner(diagonal_preconditioner(risk), generator)
    check_preconditioner(identity_preconditioner(risk), generator)


def test_models_of_the_package_with_layers_that_are_left_alone(generator: torch.Generator) -> None:
    model = bnp.models.cnn((1, 4, 4), 3, channels=(2, 2, 3), hidden=4, norm="group", norm_groups=1, seed=1)
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=generator)
    risk = bnp.EmpiricalRisk(model.double(), nn.functional.cross_entropy, (x, torch.arange(6) % 3))
    P = bnp.bnp_preconditioner(risk)
    assert sorted(P.uncovered) == sorted(n for n, _ in model.named_parameters() if n.startswith("norm"))
    check_preconditioner(P, generator)
    untouched = torch.cat([risk.space.indices(name) for name in P.uncovered])
    z = torch.randn(P.dim, dtype=torch.float64, generator=generator)
    assert torch.equal(P.apply(z)[untouched], z[untouched])


def submatrix(P: bnp.linalg.Preconditioner, positions: Tensor) -> Tensor:
    return P.to_dense()[positions][:, positions]


@pytest.mark.parametrize("kind", ["dense", "groups"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_block_is_the_submatrix_of_its_layer_or_unit(kind: str, bias: bool) -> None:
    risk = classification(kind, bias=bias)
    first, last = (name for name, module in risk.modules() if hasattr(module, "weight"))
    units = {name: risk.space.shapes[f"{name}.weight"][0] for name in (first, last)}
    for P in (bnp.bnp_preconditioner(risk), diagonal_preconditioner(risk), identity_preconditioner(risk)):
        for block in (first, last, *((name, i) for name in units for i in range(units[name]))):
            part = P.block(block)
            torch.testing.assert_close(part.to_dense(), submatrix(P, risk.space.indices(block)), rtol=0, atol=0)
    K = kfac_preconditioner(risk)
    for name in (first, last, ""):
        torch.testing.assert_close(K.block(name).to_dense(), submatrix(K, risk.space.indices(name)), rtol=0, atol=0)


def test_block_argument_is_the_block_of_the_whole() -> None:
    risk = classification("groups")
    whole = bnp.bnp_preconditioner(risk, eps1=1e-2, q="measured")
    part = bnp.bnp_preconditioner(risk, eps1=1e-2, q="measured", block=("0", 4))
    assert torch.equal(part.to_dense(), whole.block(("0", 4)).to_dense())
    for build in (diagonal_preconditioner, kfac_preconditioner):
        assert torch.equal(build(risk, block="0").to_dense(), build(risk).block("0").to_dense())


def test_a_unit_with_parameters_that_are_left_alone() -> None:
    """A subclass may add parameters: the unit's block covers its weights and is the identity on the rest."""

    class WithGain(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.gain = nn.Parameter(torch.ones(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain.sum(dim=1)

    x = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    risk = bnp.EmpiricalRisk(nn.Sequential(WithGain()).double(), nn.functional.cross_entropy, (x, torch.arange(7) % 2))
    P = bnp.bnp_preconditioner(risk)
    positions = risk.space.indices(("0", 1))
    assert positions.numel() == 6
    assert torch.equal(P.block(("0", 1)).to_dense(), submatrix(P, positions))
    assert list(P.uncovered) == ["0.gain"]


def test_blocks_that_p_couples_with_others_are_refused() -> None:
    risk = classification("dense")
    P = bnp.bnp_preconditioner(risk)
    with pytest.raises(InvalidInputError, match="meets 20 of the 24 variables"):
        P.block("0.weight")
    with pytest.raises(InvalidInputError, match="only a part of unit 1"):
        P.block(("0.weight", 1))
    with pytest.raises(InvalidInputError, match="KroneckerBlock couples"):
        kfac_preconditioner(risk).block(("0", 1))
    with pytest.raises(InvalidInputError, match="no output unit 4"):
        P.block(("0", 4))
    with pytest.raises(InvalidInputError, match="without a parameter space"):
        P.block("0").block("0")  # type: ignore[attr-defined]


def test_block_diagonal_refuses_what_does_not_fit() -> None:
    inner = DiagonalPreconditioner(torch.ones(2, dtype=torch.float64))
    for positions, message in (
        (torch.tensor([0]), "its positions are 1"),
        (torch.tensor([0, 3]), "must lie in 0..2"),
        (torch.tensor([-1, 0]), "must lie in 0..2"),
        (torch.tensor([1, 1]), "overlap"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            BlockDiagonal(3, {"a": (positions, inner)}, torch.float64)
    with pytest.raises(InvalidInputError, match=r"the whole is in torch\.float32"):
        BlockDiagonal(3, {"a": (torch.tensor([0, 1]), inner)}, torch.float32)


@pytest.mark.parametrize("build", [bnp.bnp_preconditioner, diagonal_preconditioner, kfac_preconditioner])
def test_another_dtype_is_the_same_map(build: Callable[..., BlockDiagonal], generator: torch.Generator) -> None:
    risk = classification("groups")
    P = build(risk)
    single = P.to(torch.float32)
    assert single.dtype == torch.float32
    check_preconditioner(single, generator)
    assert relative(single.to_dense().double(), P.to_dense()) < 1e-5
    assert single.block("0").dtype == torch.float32
    back = single.to(torch.float64)
    assert relative(back.to_dense(), P.to_dense()) < 1e-5
    if build is bnp.bnp_preconditioner:
        assert torch.equal(back.to_dense(), P.to_dense()), "the moments keep their precision"


def test_a_risk_in_float32_has_a_preconditioner_in_float32(generator: torch.Generator) -> None:
    risk = classification("dense").to(torch.float32)
    for P in (bnp.bnp_preconditioner(risk, q="measured"), diagonal_preconditioner(risk), kfac_preconditioner(risk)):
        assert P.dtype == torch.float32
        check_preconditioner(P, generator)
