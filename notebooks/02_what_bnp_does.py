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
# # What BNP does, layer by layer
#
# **What this page answers.** Why are layers ill-conditioned, what does BNP do to their curvature and to the gradients,
# why does this help, and when does it not? Each step of the derivation is followed by a numerical check. T-numbers
# refer to the page *Theory* of the documentation.
#
# One unit of a layer computes $a_i = w_i \cdot h + b_i$. With $\hat w_i = [b_i, w_i]$ and $\hat h = [1, h]$ this is
# $a_i = \hat w_i \cdot \hat h$. The rows $\hat h$ of all examples form the matrix $\hat H = [e, H]$, where $e$ is a
# column of ones.

# %%
import torch

import bnp_analysis as bnp
from bnp_analysis.network import layer_rows

cross_entropy = torch.nn.functional.cross_entropy
digits = bnp.data.load("digits", n=200, flatten=False)
x, y = torch.nn.functional.avg_pool2d(digits.x, 2).flatten(1), digits.y  # 4 x 4 pixels: all is dense and small here
model = bnp.models.mlp([16, 10, 8, 10], activation="leaky_relu", seed=0)
losses = bnp.training.fit(model, cross_entropy, (x, y), epochs=30, lr=0.05)
risk = bnp.EmpiricalRisk(model, cross_entropy, (x, y), dtype=torch.float64)
inputs = {name: found[:, 0] for name, found in layer_rows(risk).items()}  # a dense layer has one group of features
for name, h in inputs.items():
    print(f"{name}: H is {h.shape[0]} x {h.shape[1]}")

# %% [markdown]
# ## The Hessian of a unit is a product with the inputs on both sides (T1)
#
# The loss depends on $\hat w_i$ only through $a_i = \hat H \hat w_i$, so by the chain rule its block is
#
# $$ \nabla^2_{\hat w_i} L = \hat H^T S_i \hat H, \qquad S_i = \frac{\partial^2 L}{\partial a_i\, \partial a_i^T} . $$
#
# In the last layer $S_i$ is known: for softmax and cross-entropy it is $\mathrm{diag}(p_i (1 - p_i)) / N$. The code
# compares this formula with the block that the package computes by differentiating the network twice, without the
# formula.

# %%
layer, unit = "fc3", 2
H = inputs[layer]
N, m = H.shape
e = torch.ones(N, 1, dtype=torch.float64)
H_hat = torch.cat([e, H], dim=1)
p = risk.outputs.softmax(dim=1)[:, unit]
S = torch.diag(p * (1 - p) / N)

order = [m, *range(m)]  # torch keeps a unit's weights before its bias; here the bias comes first
block = bnp.hessian(risk, block=(layer, unit)).to_dense()[order][:, order]
t1 = float((block - H_hat.T @ S @ H_hat).norm() / block.norm())
print(f"relative difference {t1:.1e}")

# %% [markdown]
# Unless $S_i$ compensates, the condition number of a unit's Hessian is of the order of the squared condition number of
# its *inputs*. The inputs of a hidden layer are far from orthonormal columns: their means are not zero (a ReLU never
# outputs a negative number), and their scales differ.
#
# ## Change the variables, not the network (T2)
#
# BNP substitutes $\hat w = P z$ with
#
# $$ P = \tfrac1q\, U D, \qquad U = \begin{pmatrix} 1 & -\mu^T \\ 0 & I \end{pmatrix}, \qquad
# D = \mathrm{diag}(1, 1/\sigma_1, \dots, 1/\sigma_m) . $$
#
# Since $\hat H U = [e,\ H - e \mu^T]$ and $\hat H U D = [e,\ (H - e\mu^T)\,\mathrm{diag}(1/\sigma)] = \hat G$, the
# Hessian in the variables $z$ is
#
# $$ P^T\, \hat H^T S \hat H\, P = \hat G^T S \hat G / q^2 . $$

# %%
mu, sigma = H.mean(dim=0), H.std(dim=0, correction=0)
U = torch.eye(m + 1, dtype=torch.float64)
U[0, 1:] = -mu
D = torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), 1 / sigma]))
q = max(m / N, 1) ** 0.5
G_hat = torch.cat([e, (H - mu) / sigma], dim=1)

P = bnp.bnp_preconditioner(risk)  # exact moments, undamped
in_z = bnp.linalg.congruence(bnp.hessian(risk, block=(layer, unit)), P.block((layer, unit))).to_dense()[order][:, order]
t2 = float((in_z - G_hat.T @ S @ G_hat / q**2).norm() / in_z.norm())
same_P = float((P.block((layer, unit)).to_dense()[order][:, order] - U @ D / q).norm())
print(f"P^T A P against G^T S G / q^2: relative difference {t2:.1e}")
print(f"the package's P against U D / q: {same_P:.1e}")

# %% [markdown]
# ## What BNP does to the gradients (T3)
#
# Gradient descent in $z$ is $z \leftarrow z - \alpha P^T g$. In the variables of the network this is $\hat w \leftarrow
# \hat w - \alpha P P^T g$: the forward pass and inference do not change, and the gradient is multiplied by
#
# $$ P P^T = \frac{1}{q^2} \begin{pmatrix} 1 & \mu^T \\ \mu & \mu\mu^T + \mathrm{diag}(\sigma^2) \end{pmatrix}^{-1} . $$
#
# The matrix in brackets is the second moment $\hat H^T \hat H / N$ of the inputs with the *covariance* replaced by its
# diagonal. The code checks this identity, and then the update as a training loop computes it, column by column, without
# forming a matrix.

# %%
M = torch.zeros(m + 1, m + 1, dtype=torch.float64)
M[0, 0], M[0, 1:], M[1:, 0] = 1.0, mu, mu
M[1:, 1:] = torch.outer(mu, mu) + torch.diag(sigma**2)
P_unit = P.block((layer, unit)).to_dense()[order][:, order]
inverse = float((P_unit @ P_unit.T @ M * q**2 - torch.eye(m + 1)).norm())
print(f"q^2 P P^T M = I up to {inverse:.1e}")

g = risk.space.unflatten(risk.gradient)
weight, bias = g[f"{layer}.weight"], g[f"{layer}.bias"]
new_weight = (weight - torch.outer(bias, mu)) / sigma**2 / q**2
new_bias = bias / q**2 - new_weight @ mu
ours = risk.space.unflatten(P.direction(risk.gradient))
t3 = float((ours[f"{layer}.weight"] - new_weight).norm() / new_weight.norm())
t3_bias = float((ours[f"{layer}.bias"] - new_bias).norm() / new_bias.norm())
print(f"P P^T g, weight and bias: relative differences {t3:.1e}, {t3_bias:.1e}")

# %% [markdown]
# ## Why this lowers the condition number (T7)
#
# **Centring.** $\kappa(\hat H U) \le \kappa(\hat H)$: the singular values of $\hat H U$ are $\sqrt N$ and those of the
# centred inputs; $\sqrt N$ and $\sigma_{\max}(H - e\mu^T)$ are both at most $\sigma_{\max}(\hat H)$, and for a unit
# vector $x$ the vector $v = (-\mu \cdot x, x)$ gives $\hat H v = (H - e\mu^T) x$ with $|v| \ge 1$.
#
# **Scaling.** The columns of $G$ all have length $\sqrt N$, and no diagonal scaling of the centred inputs is better by
# more than $\sqrt m$: $\kappa(G) \le \sqrt m\, \min_D \kappa((H - e\mu^T) D)$, after van der Sluis.


# %%
def kappa(matrix):
    sigma = torch.linalg.svdvals(matrix)
    return float(sigma[0] / sigma[sigma > 1e-12 * sigma[0]][-1])


steps = {}
for name, h in inputs.items():
    h_centred = h - h.mean(dim=0)
    h_normalized = h_centred / h.std(dim=0, correction=0)
    steps[name] = [kappa(torch.cat([e, form], dim=1)) for form in (h, h_centred, h_normalized)]
    print("{}: kappa(H^) {:.3g} -> kappa(H^U) {:.3g} -> kappa(G^) {:.3g}".format(name, *steps[name]))

# %% [markdown]
# Centring does not increase the condition number if $\hat H$ has full column rank. Without full column rank (as for
# small batches, $N \le m$) the *effective* condition number, over the nonzero singular values, can grow. Two examples
# with two features show this:

# %%
two = torch.tensor([[10.0, 3.0], [-10.0, 3.0]], dtype=torch.float64)
raw = kappa(torch.cat([torch.ones(2, 1), two], dim=1))
centred = kappa(torch.cat([torch.ones(2, 1), two - two.mean(dim=0)], dim=1))
print(f"raw {raw:.4g}, centred {centred:.4g}")

# %% [markdown]
# ## The same for all layers, with bounds
#
# `layer_table` computes these numbers for every layer and adds the condition numbers of the curvature blocks of single
# units and whole layers. `>=` marks a lower bound: some eigenvalues below the noise floor are not known to be zero.
# Centring and scaling change the inputs but not $S$. The condition numbers of most blocks fall, but no theorem
# guarantees this for each unit.

# %%
comparison = bnp.compare(risk, P, progress=True)
comparison.layers

# %%
# alt: Bars on a logarithmic axis: the condition number of the inputs of layers fc1, fc2 and fc3, raw, centred and
# normalized. In every layer each bar is lower than the one before; normalized inputs are below 100, raw ones up to
# 60000.
ax = bnp.plotting.plot_inputs(comparison.layers)

# %%
# alt: Effective condition numbers on a logarithmic axis, without P in blue and with P in orange, for the blocks of
# three layers (squares), their units (dots) and the whole network. With P each layer's square lies two to six orders of
# magnitude lower, and so do the network's Gauss-Newton matrix and Hessian. Open triangles are lower bounds.
ax = bnp.plotting.plot_blocks(comparison)

# %% [markdown]
# ## The factor `q` (T8), and invariance
#
# `q` balances the layers: $|\hat G|^2 / N$ always lies between $\max(1, m/(N-1))$ and $m$, and for independent features
# it is close to $(1 + \sqrt{m/N})^2$, which lies in $[q^2, 4 q^2]$ for $q^2 = \max(m/N, 1)$. Correlated inputs can
# exceed the upper end.
#
# Without damping the step is invariant under shifts and scalings of the inputs: if the pixels are multiplied by 255 and
# increased by 3, and the first layer compensates for this, the curvature in $z$ does not change.

# %%
largest = {}
for name, h in inputs.items():
    G = (h - h.mean(dim=0)) / h.std(dim=0, correction=0)
    largest[name] = float(torch.linalg.svdvals(torch.cat([e, G], dim=1))[0]) ** 2 / N
    print(f"{name}: q^2 = {P.q[name] ** 2:.3g}, |G^|^2/N = {largest[name]:.3g}, m = {h.shape[1]}")

# %%
moved = bnp.models.mlp([16, 10, 8, 10], activation="leaky_relu", dtype=torch.float64)
moved.load_state_dict(model.state_dict())
with torch.no_grad():
    moved.fc1.weight /= 255
    moved.fc1.bias -= 3 * moved.fc1.weight.sum(dim=1)
shifted = bnp.EmpiricalRisk(moved, cross_entropy, (255 * x.double() + 3, y))
print(f"outputs differ by {float((shifted.outputs - risk.outputs).abs().max()):.1e}")


def unit_block(risk, preconditioner=None):
    A, N = bnp.gauss_newton(risk, block=("fc1", 0)), bnp.null_directions(risk, block=("fc1", 0))
    return bnp.condition_number(A, null=N, preconditioner=preconditioner)


plain = [unit_block(r).value for r in (risk, shifted)]
with_bnp = [unit_block(r, bnp.bnp_preconditioner(r, block=("fc1", 0))).value for r in (risk, shifted)]
print("unit 0 of fc1, plain:    {:.4g} -> {:.4g}".format(*plain))
print("unit 0 of fc1, with BNP: {:.6g} -> {:.6g}".format(*with_bnp))

# %% [markdown]
# ## To quote
#
# Each sentence is printed with the numbers of this run, and the assertions below verify it.

# %%
print(f"* The Hessian block of a unit is H^^T S H^ to {t1:.0e}, with BNP G^^T S G^ / q^2 to {t2:.0e}.")
print("* BNP multiplies gradients by P P^T; the forward pass and inference stay what they are.")
for name, (before, _, after) in steps.items():
    print(f"* Normalizing the inputs of {name} takes their condition number from {before:.3g} to {after:.3g}.")
print(f"* Where rank is missing, centring alone can hurt: two examples go from {raw:.3g} to {centred:.3g}.")
print(
    f"* Pixels times 255 plus 3 multiply a unit's kappa* by {plain[1] / plain[0]:.2g} without BNP; with undamped BNP "
    "it changes by less than a millionth."
)
assert max(t1, t2, t3, t3_bias) < 1e-12
assert same_P < 1e-10
assert inverse < 1e-9
assert all(a >= b >= c for a, b, c in steps.values())
for row in comparison.layers.layers:
    measured = [row.inputs.value, row.centered.value, row.normalized.value]
    assert all(abs(a - b) <= 1e-6 * a for a, b in zip(steps[row.layer], measured, strict=True))
    assert row.is_hessian  # T1': piecewise linear, so the Gauss-Newton blocks are the Hessian's
assert abs(raw - 10**0.5) < 1e-9
assert abs(centred - 10) < 1e-9
assert all(max(1, h.shape[1] / (N - 1)) <= largest[name] <= h.shape[1] for name, h in inputs.items())
assert plain[1] > 100 * plain[0]
assert abs(with_bnp[1] / with_bnp[0] - 1) < 1e-6
