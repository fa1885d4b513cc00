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
# # Checking the convergence theory
#
# **What this page answers.** Do the statements about conditioning hold for a network, do runs converge at the predicted
# rates, how many steps does BNP save near a minimizer, and where does the theory not apply?
#
# Each check compares a prediction with an observation that is computed as independently as possible, and gives a
# verdict. A statement whose hypotheses fail is *not applicable*, with the reason; this counts neither as success nor as
# failure.

# %%
import matplotlib.pyplot as plt
import torch

import bnp_analysis as bnp
from bnp_analysis.theory import check_bnp_gain, problems

# %% [markdown]
# ## Statements about a network
#
# The network is small and its inputs are not centred. `check_theory` accepts any risk; here it checks some of the
# statements about layers, symmetries and orbits. `bnp-analysis check` does the same from the command line, and its exit
# status says whether all of them hold.

# %%
g = torch.Generator().manual_seed(0)
x = 2 + torch.randn(40, 4, generator=g, dtype=torch.float64)
y = torch.randint(3, (40,), generator=g)
model = bnp.models.mlp([4, 4, 3], seed=0, dtype=torch.float64)
risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
checks = bnp.check_theory(risk, only=["T1", "T2", "T3", "T7", "T11"], progress=True)
checks

# %% [markdown]
# Each check contains its hypotheses and numbers:

# %%
one = checks.checks[0]
print(one)
print(dict(one.hypotheses))
print(one.details)

# %% [markdown]
# ## Rates (T14)
#
# Consider a manifold of minimizers whose tangent space is the null space of the Hessian. Near it, gradient descent
# contracts by $r = \max_\lambda |1 - \alpha\lambda|$ over the *nonzero* eigenvalues, at best by
# $(\kappa^*-1)/(\kappa^*+1)$, and heavy ball by $(\sqrt{\kappa^*}-1)/(\sqrt{\kappa^*}+1)$. The check predicts $r$ from
# the spectrum at the limit point, runs the nonlinear iteration, and fits the tail.
#
# This requires that the minimum is attained. Here a student network learns from a teacher of the same architecture.

# %%
problem = problems.teacher_student((3, 3, 2), n=40)
print(problem)
gd = bnp.check_convergence_rate(problem.risk)
print(gd)
print(f"kappa* {gd.kappa:.5g}, null space {gd.null_dim}: {dict(gd.null_sources)}, unexplained {gd.unexplained}")
heavy = bnp.check_convergence_rate(problem.risk, method="heavy_ball")
print(heavy)

# %%
# alt: Gradient norm against iteration on a logarithmic axis. Gradient descent and heavy ball both fall along straight
# lines, heavy ball about ten times as steeply; the predicted slopes, dashed and black, lie on the observed curves.
figure, ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
for check, label, colour in ((gd, "gradient descent", "#0072B2"), (heavy, "heavy ball", "#D55E00")):
    norms = check.gradient_norms
    k = torch.arange(len(norms), dtype=torch.float64)
    ax.semilogy(k, norms, color=colour, label=f"{label}, observed")
    end = check.fit.last - 1
    slope = check.factor ** (k - end) * ((k + 1) / (end + 1)) ** check.fit.power
    ax.semilogy(
        k, norms[end] * slope, "--", color="black", linewidth=0.8, label=None if check is gd else "predicted slope"
    )
ax.set_xlabel("iteration")
ax.set_ylabel("gradient norm")
legend = ax.legend(frameon=False)

# %% [markdown]
# The null space matters: if the smallest *computed* eigenvalue replaced the smallest nonzero one, the predicted rate
# would be determined by rounding errors.

# %%
print(f"iterations per factor of e: observed {gd.observed:.5g}, predicted {gd.predicted:.5g}")
print("without deflation:", gd.without_deflation)

# %% [markdown]
# ## Rates with BNP (T15)
#
# With `P` the relevant matrix is `P^T Hess P`. BNP with running statistics, on full batches, has the rate of the `P` at
# the limit point. Inputs that are shifted by one and a half standard deviations make BNP faster:

# %%
shifted = problems.teacher_student((3, 3, 2), shift=1.5, n=40)
gain = check_bnp_gain(shifted.risk)
print(gain)
for name, value in gain.details.items():
    print(f"  {name}: {value:.5g}")

# %% [markdown]
# ## Where the theory does not apply
#
# Cross-entropy on separable data has no minimizer: the weights grow without bound. The check detects this and claims no
# rate.

# %%
separable = torch.cat([torch.randn(10, 2, generator=g, dtype=torch.float64) + c for c in (-6.0, 6.0)])
labels = torch.arange(20) // 10
linear = bnp.models.mlp([2, 2], seed=0, dtype=torch.float64)
nowhere = bnp.EmpiricalRisk(linear, torch.nn.functional.cross_entropy, (separable, labels))
silent = bnp.check_convergence_rate(nowhere, time_limit=20)
print(silent)

# %% [markdown]
# ## To quote
#
# Each sentence is printed with the numbers of this run, and the assertions below verify it.

# %%
print(f"* {sum(check.holds is True for check in checks.checks)} checks of five statements hold, none fails.")
print(
    f"* At kappa* = {gd.kappa:.4g} gradient descent needs {gd.observed:.4g} iterations per factor of e, heavy ball "
    f"{heavy.observed:.3g}; predicted from the spectrum: {gd.predicted:.4g} and {heavy.predicted:.3g}."
)
print(f"* Counting the null space as curvature would have predicted {gd.without_deflation:.0e} iterations.")
print(
    f"* With shifted inputs BNP needs {gain.observed:.3g} times fewer iterations, as predicted ({gain.predicted:.3g})."
)
print("* On separable data cross-entropy has no minimizer: the rate is not applicable, and no rate is claimed.")
assert checks.holds
assert {check.source for check in checks.checks} >= {"Prop. 2 (T1)", "Theorem 4 (T7)", "T11"}
assert gd.holds
assert heavy.holds
assert abs(gd.factor - (gd.kappa - 1) / (gd.kappa + 1)) < 1e-6
assert abs(heavy.factor - (gd.kappa**0.5 - 1) / (gd.kappa**0.5 + 1)) < 1e-3
assert gd.unexplained == 0
assert heavy.observed < gd.observed / 3
assert gain.holds
assert gain.observed > 1.5
assert silent.holds is None
