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
# How badly conditioned is the loss of a small network on real data, and what does Batch Normalization Preconditioning
# (BNP) do to it? Everything here runs on the embedded `digits` in well under a minute.

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
for route in bnp.linalg.routes(A):
    print(route)

# %% [markdown]
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
# The inputs' condition numbers fall when they are centred and again when they are scaled; so do those of the
# curvature blocks.

# %%
table = bnp.layer_table(risk, P)
table.to_dataframe()

# %%
ax = bnp.plotting.plot_inputs(table)

# %%
ax = bnp.plotting.plot_blocks(table)

# %% [markdown]
# The claims of this page, asserted:

# %%
assert not undeclared.two_sided
assert declared.two_sided
assert conditioned.two_sided
assert conditioned.value < declared.value / 10
assert all(row.normalized.value < row.inputs.value for row in table.layers)

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
assert with_bnp.value < without.value
