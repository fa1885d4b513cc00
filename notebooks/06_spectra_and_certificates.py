# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Spectra and certificates: how far a condition number can be trusted
#
# **What this page answers.** When is a computed condition number right, to how many digits, and how would you notice
# that it is not?
#
# `kappa*` is the ratio of the largest to the smallest *nonzero* eigenvalue. Both "smallest" and "nonzero" are difficult
# in floating point: the smallest eigenvalue is the first to be lost in rounding errors, and rounding errors make it
# undecidable whether a number is zero. This page shows wrong ways to compute `kappa*`, on matrices whose `kappa*` is
# known, and what the package reports in each case (T13).

# %%
import torch

import bnp_analysis as bnp
from bnp_analysis.linalg import MatrixOperator, singular_condition_number
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum

generator = torch.Generator().manual_seed(0)


def widths(k):
    """A condition number, and how wide its interval is where it has two ends: four digits seldom show that."""
    if not k.two_sided:
        return str(k)
    return f"{k}\n  value / lower - 1 = {k.value / k.lower - 1:.1e}, upper / value - 1 = {k.upper / k.value - 1:.1e}"


# %% [markdown]
# ## The factor, not the matrix
#
# Curvature matrices have the form $A = F^T F$. Eigenvalues of a computed $A$ have an error of about
# $u\,\lambda_{\max}$, where $u$ is the unit roundoff, so $\lambda_{\min}$ has a relative error of $u\,\kappa$. Singular
# values of $F$ have an error of $u\,\sigma_{\max}$, so $\sigma_{\min}$ has a relative error of $u \sqrt{\kappa}$.
# Beyond $\kappa = 10^{16}$ only the factor determines the smallest eigenvalue.

# %%
n = 40
print(f"{'true kappa*':>12} {'eigenvalues of A':>22} {'singular values of F':>22}")
errors = {}
for kappa in (1e4, 1e8, 1e12, 1e16, 1e20):
    left, right = random_orthogonal(n + 10, generator)[:, :n], random_orthogonal(n, generator)
    F = left * spectrum("log", n, kappa).sqrt() @ right.T
    values = torch.linalg.eigvalsh(F.T @ F)
    by_matrix = float(values[-1] / values[0])
    by_factor = singular_condition_number(MatrixOperator(F)).value ** 2
    errors[kappa] = abs(by_matrix / kappa - 1), abs(by_factor / kappa - 1)
    print(f"{kappa:12.0e} {by_matrix:22.10g} {by_factor:22.10g}")

# %% [markdown]
# A "condition number" that is negative, or wrong by a factor, is printed like any other number. Therefore
# `condition_number` uses the factor of an operator if there is one, and otherwise reports only the bound that it can
# prove:

# %%
problem = symmetric_with_spectrum(spectrum("log", n, 1e20), generator, factor_rows=n + 10)
with_factor = bnp.condition_number(problem.operator, null=problem.null)
without_factor = bnp.condition_number(bnp.DenseOperator(problem.operator.to_dense()), null=problem.null)
print(widths(with_factor))
print(widths(without_factor))

# %% [markdown]
# ## Every method, before it runs
#
# `methods` lists every method with its cost and with the bounds that it can give, before any method runs.

# %%
for cost in bnp.linalg.methods(problem.operator):
    print(cost)

# %% [markdown]
# ## Lanczos and a null space that nobody declared
#
# Networks have null spaces. The matrix below has 400 eigenvalues; 50 are zero, and the others have `kappa* = 1e4`. Many
# scripts print the ratio of the largest to the smallest positive Ritz value. This ratio exceeds the true `kappa*` and
# keeps growing: rounding introduces components of the null space into the Krylov basis, and the corresponding Ritz
# values are noise.

# %%
singular = symmetric_with_spectrum(spectrum("log", 400, 1e4, rank=350), generator)
ratios, undeclared, declared = {}, {}, {}
for steps in (60, 100, 150):
    ritz = bnp.linalg.lanczos(singular.operator, steps, seed=1).ritz()[0]
    ratios[steps] = float(ritz[-1] / ritz[ritz > 0].min())
    undeclared[steps] = bnp.condition_number(singular.operator, method="lanczos", steps=steps, seed=1)
    print(f"{steps} steps: ratio of Ritz values {ratios[steps]:.3g}\n  {widths(undeclared[steps])}")

# %% [markdown]
# The package starts the Lanczos process in the range of the matrix, monitors the components in the null space that
# rounding introduces, and uses only the steps before these matter, for a lower bound. If the null space is declared,
# the process stays in its orthogonal complement, and a random start gives an upper bound that fails with a stated
# probability (Kuczynski and Wozniakowski 1992). This takes of the order of $\sqrt{\kappa^*}$ steps; with fewer steps
# the upper bound is infinite, and the result states how many are needed.

# %%
for steps in (100, 350):
    declared[steps] = bnp.condition_number(singular.operator, null=singular.null, method="lanczos", steps=steps, seed=1)
    print(widths(declared[steps]))
easy = symmetric_with_spectrum(spectrum("log", 400, 100.0, rank=350), generator)
probable = bnp.condition_number(easy.operator, null=easy.null, method="lanczos", steps=150, seed=1)
print(f"kappa* = 100:\n{widths(probable)}")

# %% [markdown]
# The package refuses a declared direction that is not null, since it would make the condition number too small:

# %%
try:
    bnp.condition_number(singular.operator, null=singular.vectors[:, 340:342])
    refused = ""
except bnp.errors.NullSpaceError as error:
    refused = str(error)
print(refused)

# %% [markdown]
# ## With a preconditioner: the term `|P|`
#
# The computed $F P$ differs from the exact one by about $u\, |F|\, |P|$, entry by entry. If $P$ is large and cancels
# against $F$, this error exceeds $u\, |F P|$ by far, and a bound that uses only $|F P|$ is wrong. The code draws
# matrices $F = G P^{-1}$ with large $|P|$; the exact `kappa*` of the *stored* $F$ and $P$ is computed with 60 digits.

# %%
import mpmath


def exact_kappa(F, P):
    with mpmath.workdps(60):
        product = mpmath.matrix(F.tolist()) * mpmath.matrix(P.tolist())
        sigma = mpmath.svd_r(product, compute_uv=False)
        return float((sigma[0] / sigma[len(sigma) - 1]) ** 2)


inside_naive, inside, cases = 0, 0, 20
for _ in range(cases):
    P = random_orthogonal(5, generator) * spectrum("log", 5, 1e7, scale=1e7) @ random_orthogonal(5, generator)
    G = random_orthogonal(7, generator)[:, :5] * spectrum("log", 5, 100.0).sqrt() @ random_orthogonal(5, generator)
    F = G @ torch.linalg.inv(P)
    truth = exact_kappa(F, P)
    sigma = torch.linalg.svdvals(F @ P)
    radius = 7 * 2.0**-53 * sigma[0]  # what is right for a stored matrix, and forgets |P|
    naive = [
        float((sigma[0] - radius) / (sigma[-1] + radius)) ** 2,
        float((sigma[0] + radius) / (sigma[-1] - radius)) ** 2,
    ]
    A = bnp.DenseOperator(F.T @ F, factor=F)
    k = bnp.condition_number(A, preconditioner=bnp.linalg.DensePreconditioner(P))
    inside_naive += naive[0] <= truth <= naive[1]
    inside += k.lower <= truth <= k.upper
print(f"the truth lies in the interval: without |P| {inside_naive} of {cases}, with it {inside} of {cases}")
print(f"the last one: truth {truth:.12g}\n{widths(k)}")

# %% [markdown]
# ## A spectral density is no condition number
#
# Stochastic Lanczos quadrature shows where the eigenvalues are, with error bars. An error bar has two parts. For the
# probes drawn, quadrature with $k$ steps determines the mass below any value up to an error that is bounded by a
# Christoffel function (Chebyshev, Markov, Stieltjes). The random choice of the probes adds a sampling error with a
# known distribution. A condition number depends on *one* small eigenvalue among hundreds, a mass of 1/400, which is
# below the error bar. The two matrices below have visually identical densities, and condition numbers that differ by
# $10^6$.

# %%
tame = spectrum("log", 400, 100.0)
wild = tame.clone()
wild[-1] = 1e-8
pair = [symmetric_with_spectrum(values, torch.Generator().manual_seed(1)).operator for values in (tame, wild)]
densities = [bnp.spectral_density(A, probes=8, steps=40, seed=0) for A in pair]
numbers = [bnp.condition_number(A, null=torch.zeros(400, 0, dtype=torch.float64)) for A in pair]
for density, number in zip(densities, numbers, strict=True):
    print(f"{density}\n{widths(number)}")

# %%
# alt: Two spectral densities on a logarithmic axis over eigenvalues from 0 to 1, one of a matrix with condition number
# 1e2 and one with 1e8. The curves lie on each other, and so do their wide bands, which reach down to the axis.
ax = bnp.plotting.plot_spectral_density(densities[0], label="kappa* = 1e2")
ax = bnp.plotting.plot_spectral_density(densities[1], ax, label="kappa* = 1e8", color=bnp.plotting.ORANGE)
masses = [density.mass(float("-inf"), 0.02) for density in densities]
truths = [float((values <= 0.02).double().mean()) for values in (tame, wild)]
for mass, truth in zip(masses, truths, strict=True):
    print(f"mass below 0.02: {mass}; exact {truth:.4f}")

# %% [markdown]
# ## To quote
#
# Each sentence is printed with the numbers of this run, and the assertions below verify it.

# %%
print(f"* At kappa* = 1e16 eigenvalues of A are off by {errors[1e16][0]:.0%}, at 1e20 the ratio is meaningless;")
print(f"  singular values of the factor are right to {errors[1e20][1]:.0e} there.")
print(f"* A ratio of Ritz values is no bound: at kappa* = 1e4 it read {ratios[150]:.1e} after 150 steps.")
print("* A null space that nobody declared leaves a lower bound; with the null space declared both ends are known.")
print(
    f"* Forgetting |P| in the rounding, {cases - inside_naive} of {cases} intervals miss the truth; with it none does."
)
print("* Two matrices with the same density to the eye have condition numbers that differ by a factor of 1e6.")
assert errors[1e12][0] > 1e3 * errors[1e12][1]
assert errors[1e16][0] > 0.01
assert errors[1e20][1] < 1e-3
assert with_factor.two_sided
assert with_factor.lower <= 1e20 * (1 + 1e-3)
assert not without_factor.two_sided
assert without_factor.lower <= 1e20
assert ratios[60] > 1.05e4
assert ratios[150] > 1e6
assert all(k.lower <= 1e4 and not k.two_sided for k in undeclared.values())
assert not declared[100].two_sided
assert declared[100].lower <= 1e4
assert declared[350].two_sided
assert declared[350].lower <= 1e4 * (1 + 1e-12)
assert declared[350].upper >= 1e4 * (1 - 1e-12)
assert probable.two_sided
assert 0 < probable.failure_probability < 0.01
assert probable.lower <= 100 <= probable.upper
assert refused
assert inside == cases
assert inside_naive < cases / 2
assert abs(numbers[1].value / numbers[0].value / 1e6 - 1) < 1e-3
for mass, other, truth in zip(masses, masses[::-1], truths, strict=True):
    assert mass.lower <= truth <= mass.upper
    assert mass.lower <= other.value <= mass.upper
