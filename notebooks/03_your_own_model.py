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
# **What this page answers.** Which parameters of a model of your own does BNP act on, which null directions does the
# package find, and what may be said about the blocks? Shown on a small convolutional network and a small transformer
# block, both written as anybody would write them.

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
# `coverage` runs the model once and looks. A convolution sees one row per output position, its patch, so $R$ is the
# number of examples times that of positions, and $m = k^2 c$.

# %%
risk = bnp.EmpiricalRisk(cnn, cross_entropy, (images, labels), dtype=torch.float64)
moments = layer_moments(risk)
for layer in coverage(risk):
    print(f"{layer.name}: {layer.units} units, R = {moments[layer.name].rows} rows of m = {layer.features} features")
print("not covered:", coverage(risk).uncovered)

# %% [markdown]
# Null directions are read off the operations of the forward pass: units of a ReLU can be rescaled, the softmax ignores
# a common shift, and so on. Each is verified by a product before it counts.

# %%
N = bnp.null_directions(risk)
N

# %% [markdown]
# A unit of a convolution, or a layer, is asked for by its name; so is the part of `P` that belongs to it.


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
# As in the paper, statistics are those of each input *channel*. Zero padding gives the entries of a patch means and
# variances of their own; `statistics="patch"` takes these (T6).

# %%
P_patch = bnp.bnp_preconditioner(risk, statistics="patch")
by_patch = measure(risk, P_patch, ("conv2", 0))

# %% [markdown]
# ## A transformer block
#
# Eight tokens, the rows of an image. `nn.MultiheadAttention` keeps the weights of queries, keys and values in one
# tensor and never runs its output layer as a module, so BNP cannot see their inputs. It says so, and leaves them alone.


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
# `P` leaves attention alone, its null directions are known all the same: queries and keys may be mixed against each
# other, keys shifted, values mixed. But 30 sequences do not determine all parameters: what no symmetry explains is not
# counted as zero, so the number of the whole network has no upper bound, and says why. The blocks of covered layers are
# decided.

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
# In training the same holds: `pre.uncovered` has a reason for each parameter, and their gradients stay what they are.

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
# With four `nn.Linear` modules in place of the fused one, each has inputs that can be seen, and is covered.


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
# Each sentence is printed with the numbers of this run, and asserted below it.

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
