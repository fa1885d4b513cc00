"""Every check can fail: a wrong operator, preconditioner, spectrum or symmetry is seen.

Bugs that only this file catches: a check whose two sides share the mistake, and a check that holds whatever it is
given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from theory_check_problems import CLASSES, NETWORKS, inputs, relu, risk_of
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.curvature.units import UnitBlocks, unit_blocks
from bnp_analysis.linalg.derived import Shifted
from bnp_analysis.precondition import BNPBlock, BNPPreconditioner
from bnp_analysis.symmetry.candidates import Candidate, Part
from bnp_analysis.theory.convergence import ConvergenceCheck
from bnp_analysis.theory.statements import (
    conditioning,
    normalization,
    spectra,
    symmetry,
)
from bnp_analysis.theory.statements import layers as coordinates
from bnp_analysis.theory.statements import layers as layer_curvature
from bnp_analysis.theory.statements import normalization as statistics
from bnp_analysis.theory.statements import rates as rate_checks
from bnp_analysis.theory.statements import setting as problem
from bnp_analysis.theory.statements.setting import Problem

Patch = pytest.MonkeyPatch
bnp_preconditioner = bnp.bnp_preconditioner


def fails(statement: problem.Statement, risk: bnp.EmpiricalRisk | Problem, *words: str, P: object = None) -> None:
    """For all of the words some check whose statement contains them fails, and says so with its numbers."""
    checks = statement(risk, P)  # type: ignore[arg-type]
    for said in words:
        found = [c for c in checks if said in c.statement]
        assert found, f"no check says {said!r}"
        wrong = [c for c in found if c.holds is False]
        assert wrong, [str(c) for c in found]
        assert not math.isnan(wrong[0].observed)
        assert " fails " in str(wrong[0])


def tampered(risk: bnp.EmpiricalRisk, change: Callable[[BNPBlock], BNPBlock]) -> BNPPreconditioner:
    """A preconditioner that says it is BNP's and is not."""
    P = bnp_preconditioner(risk)
    blocks = {name: (positions, change(block)) for name, (positions, block) in P.blocks.items()}
    return BNPPreconditioner(
        risk.space, blocks, settings=P.settings, constant_features=P.constant_features, uncovered=P.uncovered
    )


def unbiased(block: BNPBlock) -> BNPBlock:
    """Variances divided by R - 1."""
    return BNPBlock(block.mean, block.variance * 60 / 59, block.q, units=block.units, bias=block.bias)


def uncentered(block: BNPBlock) -> BNPBlock:
    return BNPBlock(0.9 * block.mean, block.variance, block.q, units=block.units, bias=block.bias)


# T1


def test_a_gauss_newton_matrix_in_place_of_the_hessian(monkeypatch: Patch) -> None:
    def wrong(risk: bnp.EmpiricalRisk, *, block: object = None) -> bnp.linalg.SymmetricOperator:
        return bnp.gauss_newton(risk, block=block) if block else bnp.hessian(risk)  # type: ignore[arg-type]

    monkeypatch.setattr(layer_curvature, "hessian", wrong)
    fails(layer_curvature.check_dense_blocks, NETWORKS["tanh"](), "(I (x) H^)^T S (I (x) H^) [0]")


def test_examples_that_are_coupled_unnoticed(monkeypatch: Patch) -> None:
    def unnoticed(risk: bnp.EmpiricalRisk, *args: object, **more: object) -> bnp.EmpiricalRisk:
        made = original(risk, *args, **more)
        made.coupled = False
        return made

    original = layer_curvature.rewritten
    monkeypatch.setattr(layer_curvature, "rewritten", unnoticed)
    fails(layer_curvature.check_dense_blocks, NETWORKS["batch norm, live"](), "S_i is diagonal [0]")


def test_an_empirical_fisher_matrix_in_place_of_gauss_newton(monkeypatch: Patch) -> None:
    monkeypatch.setattr(layer_curvature, "gauss_newton", lambda risk, block: bnp.fisher(risk, "empirical", block=block))
    fails(layer_curvature.check_hessian_is_gauss_newton, relu(), "equals its Gauss-Newton block")


def test_blocks_of_units_that_forget_the_square(monkeypatch: Patch) -> None:
    def rooted(risk: bnp.EmpiricalRisk, layers: object) -> dict[str, UnitBlocks]:
        return {name: UnitBlocks(b.rows, b.scales.sqrt()) for name, b in unit_blocks(risk, layers).items()}

    monkeypatch.setattr(layer_curvature, "unit_blocks", rooted)
    fails(layer_curvature.check_dense_blocks, relu(), "a unit's Gauss-Newton block is")


# T2, T3, T5


class WithoutTranspose(bnp.linalg.DensePreconditioner):
    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matmat(y)


def test_a_preconditioner_without_its_transpose() -> None:
    risk = relu()
    wrong = WithoutTranspose(bnp_preconditioner(risk).to_dense())
    words = "multiplies gradients by P P^T", "the Hessian in z is P^T A P"
    fails(coordinates.check_coordinates, risk, *words, P=wrong)


def test_a_broken_change_of_variables(monkeypatch: Patch) -> None:
    risk = relu()

    def elsewhere(risk: bnp.EmpiricalRisk, P: bnp.linalg.Preconditioner) -> bnp.EmpiricalRisk:
        made = original(risk, P)
        return made.at(1.01 * made.theta)

    original = coordinates.in_coordinates
    monkeypatch.setattr(coordinates, "in_coordinates", elsewhere)
    fails(coordinates.check_coordinates, risk, "the forward pass is unchanged")


@pytest.mark.parametrize("change", [unbiased, uncentered])
def test_wrong_moments(change: Callable[[BNPBlock], BNPBlock]) -> None:
    risk = relu()
    wrong = tampered(risk, change)
    fails(coordinates.check_coordinates, risk, "the rows of H^ P are those of G^ / q", P=wrong)
    fails(coordinates.check_update, risk, "the update of a layer follows", "inverse of the second moment", P=wrong)


def test_damping_that_is_not_there(monkeypatch: Patch) -> None:
    monkeypatch.setattr(coordinates, "bnp_preconditioner", lambda risk, **options: bnp_preconditioner(risk))
    wide = risk_of(lambda: nn.Linear(3, CLASSES), inputs(30, 3) * torch.tensor([1.0, 100.0, 1e4]).double())
    fails(coordinates.check_update, wide, "damping bounds what is corrected")


def test_a_damped_step_sees_scales(monkeypatch: Patch) -> None:
    monkeypatch.setattr(coordinates, "bnp_preconditioner", lambda risk, **o: bnp_preconditioner(risk, eps2=0.1))
    fails(coordinates.check_update, relu(), "the undamped step does not see")


def test_wrong_forms_without_a_bias(monkeypatch: Patch) -> None:
    monkeypatch.setattr(problem, "bnp_preconditioner", lambda risk: bnp_preconditioner(risk, bias_free="diagonal"))
    fails(coordinates.check_without_bias, relu(), "without a bias P P^T")
    monkeypatch.undo()
    monkeypatch.setattr(coordinates, "bnp_preconditioner", lambda risk, bias_free: bnp_preconditioner(risk, q=1.0))
    fails(coordinates.check_without_bias, relu(), "its q^2")
    monkeypatch.setattr(
        coordinates,
        "bnp_preconditioner",
        lambda risk, bias_free: bnp_preconditioner(risk, eps2=1.0, bias_free=bias_free),
    )
    fails(coordinates.check_without_bias, relu(), "every column of H P")


# T4, T6


def test_averages_of_variances_within_batches(monkeypatch: Patch) -> None:
    def within(mean: Tensor, var: Tensor, m: Tensor, v: Tensor, rho: float) -> tuple[Tensor, Tensor]:
        return rho * mean + (1 - rho) * m, rho * var + (1 - rho) * v

    monkeypatch.setattr(statistics, "update_moments", within)
    words = "mixture of all rows", "the corrected start", "with cumulative counts"
    fails(statistics.check_running_statistics, relu(), *words)


def test_channel_statistics_in_place_of_patch_statistics(monkeypatch: Patch) -> None:
    def channel(given: Problem, layer: object, statistics: str = "channel") -> object:
        return original(given, layer, "channel")

    original = statistics.own_moments
    monkeypatch.setattr(statistics, "own_moments", channel)
    words = "per-patch statistics center", "the per-patch preconditioner makes"
    fails(statistics.check_patch_statistics, NETWORKS["conv"](), *words)


def test_channel_statistics_of_the_wrong_values(monkeypatch: Patch) -> None:
    def shifted(given: Problem, layer: object, statistics: str = "channel") -> object:
        found = original(given, layer, statistics)
        return dataclasses.replace(found, mean=found.mean + 0.1) if statistics == "channel" else found

    original = statistics.own_moments
    monkeypatch.setattr(statistics, "own_moments", shifted)
    fails(statistics.check_patch_statistics, NETWORKS["conv, circular"](), "per-channel statistics center")


# T7, T8


def test_inputs_that_are_conditioned_by_something_else(monkeypatch: Patch) -> None:
    monkeypatch.setattr(conditioning.Inputs, "centered", property(lambda self: self.H + 10 * self.H.mean(dim=0)))
    fails(conditioning.check_centering, relu(), "centering: kappa(H^U)", "kappa(H^U) < kappa(H^)")
    monkeypatch.undo()
    monkeypatch.setattr(
        conditioning.Inputs, "G", property(lambda self: self.H * 10.0 ** torch.arange(0, 3 * self.m, 3))
    )
    fails(conditioning.check_conditioning, relu(), "<= m kappa(S)^2")
    fails(conditioning.check_scale, relu(), "|G^|^2/R <= m")
    monkeypatch.setattr(conditioning.Inputs, "G", property(lambda self: 0.1 * self.centered))
    fails(conditioning.check_scale, relu(5), "|G^|^2/R >=")


def test_a_scaling_that_beats_the_bound(monkeypatch: Patch) -> None:
    monkeypatch.setattr(conditioning, "_best_scaling", lambda unit, rank, g: 0.3)
    fails(conditioning.check_conditioning, relu(), "scaling: kappa*(G)")
    words = "scaling: kappa(G^) <= sqrt(n+1)", "kappa(H^U) <= kappa(D) sqrt(n+1)"
    fails(conditioning.check_centering, relu(), *words)


def test_a_condition_number_that_is_off(monkeypatch: Patch) -> None:
    """The root of the condition number where the number itself is meant."""

    def root(matrix: Tensor) -> bnp.linalg.ConditionNumber:
        found = original(matrix)
        unweighted = bool((matrix[:, -1] == 1).all())
        return (
            dataclasses.replace(found, **dict.fromkeys(("value", "lower", "upper"), found.value**0.1))
            if unweighted
            else found
        )

    original = conditioning.singular
    monkeypatch.setattr(conditioning, "singular", root)
    fails(conditioning.check_through_curvature, relu(), "through S")
    fails(conditioning.check_conditioning, relu(), "the gain of centering")


def test_q_that_was_not_measured(monkeypatch: Patch) -> None:
    monkeypatch.setattr(conditioning, "bnp_preconditioner", lambda risk, q: bnp_preconditioner(risk))
    fails(conditioning.check_scale, relu(), 'q = "measured"')


# T9


def test_bnp_that_is_not_bn(monkeypatch: Patch) -> None:
    monkeypatch.setattr(normalization, "bnp_preconditioner", lambda risk, q: bnp_preconditioner(risk, q=q, eps1=1e-3))
    words = "BN at fixed statistics is BNP", "a layer's own gradient is P^T grad"
    fails(normalization.check_batch_norm, relu(), *words)


class Detached(normalization.LiveNorm):
    """Live statistics through which nothing is differentiated."""

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            mean, std = h.mean(dim=0), h.std(dim=0, unbiased=False)
        return (h - mean) / std


def test_a_norm_that_passes_everything_below(monkeypatch: Patch) -> None:
    monkeypatch.setattr(normalization, "LiveNorm", Detached)
    fails(normalization.check_batch_norm, relu(), "acts on what is passed below")


def test_the_live_norm_is_batch_norm() -> None:
    h = inputs(20, 4)
    expected = nn.functional.batch_norm(h, None, None, training=True, eps=1e-30)
    torch.testing.assert_close(normalization.LiveNorm(-1)(h), expected, rtol=1e-12, atol=1e-12)
    images = inputs(5, 4, 3, 3)
    expected = nn.functional.batch_norm(images, None, None, training=True, eps=1e-30)
    torch.testing.assert_close(normalization.LiveNorm(-3)(images), expected, rtol=1e-12, atol=1e-12)


# T10, T12


def test_output_scaling_that_is_left_out(monkeypatch: Patch) -> None:
    monkeypatch.setattr(symmetry, "bnp_preconditioner", lambda risk, output_scale=False: bnp_preconditioner(risk))
    fails(symmetry.check_output_scaling, relu(), "with output scaling")


def test_damping_along_orbits(monkeypatch: Patch) -> None:
    def damped(risk: bnp.EmpiricalRisk, output_scale: bool = False) -> BNPPreconditioner:
        return bnp_preconditioner(risk, eps2=1e-2, output_scale=output_scale)

    monkeypatch.setattr(symmetry, "bnp_preconditioner", damped)
    words = "the outgoing layer's block", "their cross block", "follows the law [bnp"
    fails(symmetry.check_orbits, relu(), *words)


def test_a_scaling_that_is_no_symmetry(monkeypatch: Patch) -> None:
    def twice(given: Problem) -> list[symmetry.Scaling]:
        def squared(e: Tensor) -> Tensor:
            return torch.where(e < 0, 1.5 * e, e)

        return [dataclasses.replace(one, exponents=squared(one.exponents)) for one in original(given)]

    original = symmetry.scalings
    monkeypatch.setattr(symmetry, "scalings", twice)
    words = "Hess(T theta) = T^-T Hess(theta) T^-1", "follows the law [plain", "the incoming units' block"
    fails(symmetry.check_orbits, relu(), *words)


# T11


def test_invented_null_directions() -> None:
    given = Problem(relu())
    found = given.null
    basis = torch.linalg.qr(torch.randn(53, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    given.__dict__["null"] = dataclasses.replace(found, blocks=((torch.arange(53), basis),), sources={"invented": 30})
    words = "explained null dimensions", "every direction found is null"
    fails(symmetry.check_null_directions, given, *words)


def test_what_is_not_explained_is_named() -> None:
    given = Problem(relu())
    found = given.null
    two = ((torch.arange(53), found.basis[:, :2]),)
    given.__dict__["null"] = dataclasses.replace(found, blocks=two, sources={"some": 2})
    check = symmetry.check_null_directions(given)[0]
    assert check.holds
    rest = int(check.details["nullity"]) - 2
    assert check.reason == f"unexplained: {rest}"
    assert check.details["unexplained"] == rest > 10


@pytest.mark.parametrize("name", ["relu", "linear", "conv"])
def test_a_generator_with_a_wrong_sign(name: str, monkeypatch: Patch) -> None:
    def wrong(given: Problem) -> list[object]:
        return [dataclasses.replace(one, sign=one.sign.abs()) for one in original(given)]

    original = symmetry.generators
    monkeypatch.setattr(symmetry, "generators", wrong)
    fails(symmetry.check_null_directions, NETWORKS[name](), "along a linear generator")


def test_a_shift_that_the_loss_sees(monkeypatch: Patch) -> None:
    def wrong(risk: bnp.EmpiricalRisk) -> tuple[list[object], list[str]]:
        positions = torch.arange(risk.space.dim)[risk.space.slice_of("0.bias")]
        return [Candidate("softmax shift", (Part(positions, torch.ones(len(positions), 1).double()),))], []

    monkeypatch.setattr(symmetry, "candidate_directions", wrong)
    fails(symmetry.check_null_directions, relu(), "along the shift of all logits")


# T14, T15


def test_rates_that_are_not_what_the_spectrum_says(monkeypatch: Patch) -> None:
    def off(risk: bnp.EmpiricalRisk, P: object = None, *, method: str = "gd", **more: object) -> ConvergenceCheck:
        observed = {"gd": 100.0, "heavy_ball": 100.0, "bnp": 50.0}[method]
        return ConvergenceCheck(
            statement=method, source="T14", holds=False, observed=observed, predicted=80.0, tolerance=0.03, kappa=160.0
        )

    monkeypatch.setattr(rate_checks, "check_convergence_rate", off)
    fails(rate_checks.check_descent, relu(), "gd [teacher-student", "heavy_ball [teacher-student")
    words = "bnp [teacher-student", "BNP is faster than gradient descent by the ratio"
    fails(rate_checks.check_preconditioned_descent, relu(), *words)


# T13, T16


def test_the_gram_matrix_in_place_of_the_factor(monkeypatch: Patch) -> None:
    def by_gram(A: bnp.linalg.SymmetricOperator, **options: object) -> bnp.linalg.ConditionNumber:
        return bnp.condition_number(A, **(options | {"method": "dense"}))  # type: ignore[arg-type]

    monkeypatch.setattr(spectra, "condition_number", by_gram)
    fails(spectra.check_floating_point, relu(), "from the factor", "from the Gram matrix")


def test_intervals_that_are_too_narrow_or_too_wide(monkeypatch: Patch) -> None:
    def sure(A: bnp.linalg.SymmetricOperator, **options: object) -> bnp.linalg.ConditionNumber:
        found = bnp.condition_number(A, **options)  # type: ignore[arg-type]
        return dataclasses.replace(found, lower=1.001 * found.value, upper=1.002 * found.value)

    monkeypatch.setattr(spectra, "condition_number", sure)
    fails(spectra.check_floating_point, relu(), "with the |P| term")
    monkeypatch.undo()
    monkeypatch.setattr(spectra, "radius_without_product", lambda largest, shape: 1e-3 * largest)
    fails(spectra.check_floating_point, relu(), "without the |P| term")


def test_bounds_of_lanczos_that_claim_too_much(monkeypatch: Patch) -> None:
    def shifted(A: bnp.linalg.SymmetricOperator, **options: object) -> bnp.linalg.ConditionNumber:
        if options.get("method") != "lanczos":
            return bnp.condition_number(Shifted(A, 1.0))
        return bnp.condition_number(A, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(spectra, "condition_number", shifted)
    fails(spectra.check_floating_point, relu(), "extreme Ritz values")
    monkeypatch.undo()
    monkeypatch.setattr(spectra, "kuczynski_wozniakowski", lambda high, low, *rest: (high, low))
    fails(spectra.check_floating_point, relu(), "Kuczynski-Wozniakowski")


def test_blocks_that_are_not_whitened(monkeypatch: Patch) -> None:
    def unwhitened(F: Tensor) -> tuple[Tensor, Tensor] | None:
        found = original(F)
        return None if found is None else (found[0] * found[1], torch.ones_like(found[1]))

    original = spectra.whitened_block
    monkeypatch.setattr(spectra, "whitened_block", unwhitened)
    shifted = risk_of(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)), 30 * inputs(60, 6) + 300
    )
    best = "kappa*(P^T A P) <= s min kappa*(D^T A D) over block-diagonal D [network"
    fails(spectra.check_blocks, shifted, best, "lambda_max <= s", "with block eigenvalues in [a, b]")
