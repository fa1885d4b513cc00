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
# # A first condition number
#
# **What this page answers.** How badly conditioned is the loss of a small network on real data, and what does Batch
# Normalization Preconditioning (BNP) do to it? When is such a number certain, and when is it only a lower bound?
# Everything here runs on the embedded `digits` in well under a minute.
#
# | symbol | meaning |
# |---|---|
# | $\theta$ | all weights and biases of the network, as one vector |
# | $L(\theta)$ | the risk: the mean loss over the data |
# | $A$ | the curvature of $L$ at $\theta$, a symmetric matrix; here the Gauss-Newton matrix, $\lambda \ge 0$ |
# | $\kappa^*$ | printed `kappa*` or `k*`: the largest eigenvalue of $A$ over its smallest *nonzero* one |
# | $N$ | a basis of known null directions: $A N = 0$ |
# | $P$, $z$ | the preconditioner, an invertible matrix, and the variables of $\theta = P z$ |

# %%
import torch

import bnp_analysis as bnp

digits = bnp.data.load("digits", n=1000)
model = bnp.models.mlp([64, 12, 10], seed=0)
bnp.training.fit(model, torch.nn.functional.cross_entropy, digits.tensors, epochs=2, lr=0.05)

# %% [markdown]
# ## The risk, and its curvature
#
# An `EmpiricalRisk` is the mean loss as a pure function of the flat parameter vector: a snapshot of model and data.
# The Gauss-Newton matrix is an operator; nothing is computed until somebody multiplies with it.

# %%
risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, digits.tensors, dtype=torch.float64)
A = bnp.gauss_newton(risk)
print(risk)
print(A)
for cost in bnp.linalg.methods(A):
    print(cost)

# %% [markdown]
# `kappa* = a (b .. c)` claims that $\kappa^*$ lies between `b` and `c`; `kappa* >= b` claims a lower bound alone.
# Without further words the smallest *nonzero* eigenvalue is not known: some eigenvalues lie below the noise floor,
# and nothing says that they are zero. So the answer is one-sided.

# %%
undeclared = bnp.condition_number(A)
print(undeclared)

# %% [markdown]
# ## Known null directions
#
# ReLU units can be rescaled, the softmax ignores a common shift, some pixels are constant, some rows never reach a
# unit: such directions are found from the structure, and each is verified by a product.

# %%
N = bnp.null_directions(risk)
print(N)
declared = bnp.condition_number(A, null=N)
print(declared)

# %% [markdown]
# ## With the preconditioner
#
# `P` is built from the mean and variance of each layer's inputs; the curvature in the variables `z` of `theta = P z`
# is `P^T A P`. Null directions are transported along.

# %%
P = bnp.bnp_preconditioner(risk)
conditioned = bnp.condition_number(A, preconditioner=P, null=N)
print(conditioned)
print(f"BNP divides kappa* by {declared.value / conditioned.value:.3g}")

# %% [markdown]
# ## Layer by layer
#
# $\hat H$ is the matrix of a layer's inputs, a row for each example, with a column of ones for the bias. $\hat H U$ are
# the same with each feature centred, $\hat G$ centred and divided by its standard deviation. `k(.)` is the largest over
# the smallest nonzero singular value, `R` and `m` are the numbers of rows and features, `units k*` is the median (the
# largest) of the curvature blocks of single units. The inputs' condition numbers fall when they are centred and again
# when they are scaled; so do those of the curvature blocks.

# %%
table = bnp.layer_table(risk, P)
table

# %%
# alt: Bars on a logarithmic axis: the condition number of the inputs of layers fc1 and fc2, raw, centred and
# normalized. In both layers each bar is lower than the one before; in fc1 they fall from about 9000 to 20.
ax = bnp.plotting.plot_inputs(table)

# %%
# alt: Effective condition numbers of curvature blocks on a logarithmic axis, for layers fc1 and fc2, without P in blue
# and with P in orange. Squares are blocks of layers, dots those of single units. Orange lies below blue by orders of
# magnitude in both layers, most in fc1.
ax = bnp.plotting.plot_blocks(table)

# %% [markdown]
# ## Your own model
#
# Ten lines: any module, any loss that is a mean over the batch, your data as `(x, y)` or a loader.


# %%
class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(3, 5), torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x)))


torch.manual_seed(0)
x = 1 + torch.randn(200, 3)
mine = bnp.EmpiricalRisk(Mine(), torch.nn.functional.mse_loss, (x, x.sum(1, keepdim=True)), dtype=torch.float64)
A, N, P = bnp.gauss_newton(mine), bnp.null_directions(mine), bnp.bnp_preconditioner(mine)
without = bnp.condition_number(A, null=N)
with_bnp = bnp.condition_number(A, null=N, preconditioner=P)
print(f"without P: {without}\nwith P:    {with_bnp}")

# %% [markdown]
# ## To quote
#
# Each sentence is printed with the numbers of this run, and asserted below it.

# %%
print(f"* kappa* of the Gauss-Newton matrix of a 64-12-10 ReLU network on 1000 digits is {declared.value:.3g}.")
print(f"* BNP makes it {conditioned.value:.3g}: smaller by a factor of {declared.value / conditioned.value:.2g}.")
print(
    f"* It is certain (two-sided) only because {declared.null_dim} of {risk.space.dim} directions are known to be null."
)
print(f"* Without these the same computation claims a lower bound alone: kappa* >= {undeclared.lower:.3g}.")
assert not undeclared.two_sided
assert declared.two_sided
assert conditioned.two_sided
assert conditioned.value < declared.value / 10
assert all(row.normalized.value < row.inputs.value for row in table.layers)
assert with_bnp.value < without.value
