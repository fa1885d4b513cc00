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
# # Your own model: what is covered, and what is not
#
# **What this page answers.** On which parameters of your own model does BNP act, which null directions does the package
# find, and what is known about the curvature blocks? The examples are a small convolutional network and a small
# transformer block, both written in plain PyTorch.

# %%
import torch
from torch import nn

import bnp_analysis as bnp
from bnp_analysis.network import coverage, layer_moments

cross_entropy = nn.functional.cross_entropy
images, labels = bnp.data.load("digits", n=100, flatten=False).tensors
print(images.shape)

# %% [markdown]
# ## A convolutional network


# %%
class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(3, 4, kernel_size=3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))


with torch.random.fork_rng():
    torch.manual_seed(0)
    cnn = Convolutional()
losses = bnp.training.fit(cnn, cross_entropy, (images, labels), epochs=10, lr=0.02)

# %% [markdown]
# `coverage` runs the model once and lists the layers on which BNP can act. A convolution has one row per example and
# output position, the patch under its kernel, so that $R$ is the number of examples times the number of positions, and
# $m = k^2 c$.

# %%
risk = bnp.EmpiricalRisk(cnn, cross_entropy, (images, labels), dtype=torch.float64)
moments = layer_moments(risk)
for layer in coverage(risk):
    print(f"{layer.name}: {layer.units} units, R = {moments[layer.name].rows} rows of m = {layer.features} features")
print("not covered:", coverage(risk).uncovered)

# %% [markdown]
# The package derives null directions from the operations of the forward pass: units of a ReLU can be rescaled, the
# softmax is invariant under a common shift, and so on. It verifies each by a product before it counts it.

# %%
N = bnp.null_directions(risk)
N

# %% [markdown]
# The block of a layer or of a single unit is selected by name, and so is the corresponding block of `P`.


# %%
def measure(risk, P, name):
    A, null = bnp.gauss_newton(risk, block=name), bnp.null_directions(risk, block=name)
    plain = bnp.condition_number(A, null=null)
    conditioned = bnp.condition_number(A, null=null, preconditioner=P.block(name))
    print(f"{name}\n  plain:  {plain}\n  with P: {conditioned}")
    return plain, conditioned


P = bnp.bnp_preconditioner(risk)
cnn_blocks = {name: measure(risk, P, name) for name in [("conv1", 0), ("conv2", 0), "head"]}

# %% [markdown]
# As in the paper, means and variances are taken per input *channel*. With zero padding the entries of a patch have
# different means and variances; `statistics="patch"` uses those (T6).

# %%
P_patch = bnp.bnp_preconditioner(risk, statistics="patch")
by_patch = measure(risk, P_patch, ("conv2", 0))

# %% [markdown]
# ## A transformer block
#
# The input is eight tokens, the rows of an image. `nn.MultiheadAttention` stores the weights of queries, keys and
# values in one tensor and never calls its output layer as a module, so that BNP cannot observe their inputs. BNP
# reports this and does not change these parameters.


# %%
class Transformer(nn.Module):
    def __init__(self, attention, width=6):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.inner, self.outer = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x) + self.position
        h = self.norm1(x)
        x = x + self.attention(h, h, h)[0]
        x = x + self.outer(torch.relu(self.inner(self.norm2(x))))
        return self.head(x.mean(dim=1))


with torch.random.fork_rng():
    torch.manual_seed(0)
    fused = Transformer(nn.MultiheadAttention(6, 2, batch_first=True))
tokens = images[:, 0]
losses = bnp.training.fit(fused, cross_entropy, (tokens, labels), epochs=10, lr=0.05)
fused_risk = bnp.EmpiricalRisk(fused, cross_entropy, (tokens, labels), dtype=torch.float64)
print("covered:", [layer.name for layer in coverage(fused_risk)])
for name, reason in coverage(fused_risk).uncovered.items():
    print(f"  {name}: {reason}")

# %% [markdown]
# `P` is the identity on the attention parameters, but their null directions are known: an invertible matrix can be
# moved between queries and keys, keys can be shifted, and an invertible matrix can be moved between values and outputs.
# However, 30 sequences do not determine all parameters. Eigenvalues that no symmetry explains do not count as zero, so
# the condition number of the whole network has no upper bound, and the result says why. The blocks of covered layers
# have two-sided results.

# %%
few = bnp.EmpiricalRisk(fused, cross_entropy, (tokens[:30], labels[:30]), dtype=torch.float64)
few_N = bnp.null_directions(few)
print(few_N)
whole = bnp.condition_number(bnp.gauss_newton(few), null=few_N)
print(whole)

# %%
fused_P = bnp.bnp_preconditioner(fused_risk)
fused_blocks = {name: measure(fused_risk, fused_P, name) for name in ["embed", ("inner", 0), "head"]}

# %% [markdown]
# The same holds in training: `pre.uncovered` gives a reason for each uncovered parameter, and BNP does not change its
# gradient.

# %%
pre = bnp.BNP(fused)
cross_entropy(fused(tokens), labels).backward()
before = {name: p.grad.clone() for name, p in fused.named_parameters()}
pre.step()
changed = {name for name, p in fused.named_parameters() if not torch.equal(p.grad, before[name])}
print("changed:", ", ".join(sorted(changed)))
pre.close()

# %% [markdown]
# ## Attention from linear layers is covered
#
# With four `nn.Linear` modules in place of the fused module, BNP observes the inputs of each and covers it.


# %%
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries, keys, values):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, queries), (self.k, keys), (self.v, values))
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


with torch.random.fork_rng():
    torch.manual_seed(0)
    open_model = Transformer(Attention(6, 2))
losses = bnp.training.fit(open_model, cross_entropy, (tokens, labels), epochs=10, lr=0.05)
open_risk = bnp.EmpiricalRisk(open_model, cross_entropy, (tokens, labels), dtype=torch.float64)
names = [layer.name for layer in coverage(open_risk)]
print("covered:", names)
share = sum(open_risk.space.restrict(open_risk.space.layer_names(name)).dim for name in names) / open_risk.space.dim
print(f"{share:.0%} of the parameters")
open_P = bnp.bnp_preconditioner(open_risk)
open_blocks = {name: measure(open_risk, open_P, name) for name in ["attention.v", "attention.out"]}

# %% [markdown]
# ## To quote
#
# Each sentence is printed with the numbers of this run, and the assertions below verify it.

# %%
for words, name in (("one unit of conv2", ("conv2", 0)), ("the head", "head")):
    plain, conditioned = cnn_blocks[name]
    print(
        f"* In the convolutional network BNP takes kappa* of {words} from {plain.value:.3g} to {conditioned.value:.3g}."
    )
print("* The first convolution sees raw pixels of one channel: BNP changes its kappa* by a few per cent.")
print("* nn.MultiheadAttention hides the inputs of its weights: BNP leaves it alone and says so.")
print(f"* Attention made of nn.Linear modules is covered: {share:.0%} of that transformer's parameters.")
print("* With 30 sequences the whole transformer's kappa* has only a lower bound; single layers are decided.")
assert abs(cnn_blocks["conv1", 0][1].value / cnn_blocks["conv1", 0][0].value - 1) < 0.1
assert coverage(risk).uncovered == {}
assert N.not_analysed == ()
assert all(k.two_sided for pair in cnn_blocks.values() for k in pair)
assert cnn_blocks["conv2", 0][1].value < cnn_blocks["conv2", 0][0].value / 10
assert cnn_blocks["head"][1].value < cnn_blocks["head"][0].value / 10
assert by_patch[1].two_sided
assert "attention.in_proj_weight" in coverage(fused_risk).uncovered
assert few_N.not_analysed == ()
assert {"attention query-key", "key bias", "attention values"} <= set(few_N.sources)
assert not whole.two_sided
assert all(k.two_sided for pair in fused_blocks.values() for k in pair)
covered = {f"{name}.{leaf}" for name in ("embed", "inner", "outer", "head") for leaf in ("weight", "bias")}
assert changed == covered
assert set(names) == {"embed", "inner", "outer", "head", "attention.q", "attention.k", "attention.v", "attention.out"}
assert share > 0.8
