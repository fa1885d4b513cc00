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
# # Training with BNP: small batches, one example at a time, a stream
#
# BNP changes gradients and nothing else, so it does not need batches. The options and their reasons are in
# `docs/training.md`; here it is used: in a plain loop, at batch size 1, on a stream whose inputs move, behind an
# optimizer that somebody else steps.

# %%
import matplotlib.pyplot as plt
import torch

import bnp_analysis as bnp

cross_entropy = torch.nn.functional.cross_entropy
train, test = bnp.data.load("digits", n=400), bnp.data.load("digits", split="test")


def network(norm="none"):
    return bnp.models.mlp([64, 24, 24, 10], norm=norm, seed=0)


def accuracy(model):
    model.eval()
    with torch.no_grad():
        right = (model(test.x).argmax(dim=1) == test.y).double().mean()
    model.train()
    return float(right)


# %% [markdown]
# ## A plain loop
#
# Two lines are new. `pre = bnp.BNP(model)` puts hooks on the layers, which see the inputs pass; `pre.step()` replaces
# `.grad` by `P P^T .grad`, right before the optimizer reads it.

# %%
model = network()
pre = bnp.BNP(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
order = torch.Generator().manual_seed(0)
for epoch in range(4):
    for rows in torch.randperm(len(train.x), generator=order).split(16):
        optimizer.zero_grad()
        cross_entropy(model(train.x[rows]), train.y[rows]).backward()
        pre.step()
        optimizer.step()
    print(f"epoch {epoch + 1}: accuracy {accuracy(model):.3f}")
pre

# %% [markdown]
# No layer was added: what was trained is the plain network, and without BNP it computes the same.

# %%
bare = network()
bare.load_state_dict(model.state_dict())
same_inference = torch.equal(bare(test.x), model(test.x))
pre.close()
print(list(model.state_dict()) == list(bare.state_dict()), same_inference)

# %% [markdown]
# ## The same loop as one call, at three batch sizes
#
# `bnp.train` is that loop with logs, checkpoints and evaluation. Three learning rates for each method and batch size,
# two epochs, the best one is kept, as it should be when methods are compared. One seed and a small set: a picture of
# what happens, not a benchmark (those are in `benchmarks/`).

# %%
RATES = {"plain": (0.03, 0.3, 1.0), "batch norm": (0.1, 0.3, 1.0), "BNP": (0.03, 0.1, 0.3)}
BATCHES = (60, 6, 1)


def run(method, batch_size, lr):
    model = network("batch" if method == "batch norm" else "none")
    pre = bnp.BNP(model) if method == "BNP" else None
    found = bnp.train(
        model,
        cross_entropy,
        train.tensors,
        torch.optim.SGD(model.parameters(), lr=lr),
        preconditioner=pre,
        epochs=2,
        batch_size=batch_size,
        eval_data=test.tensors,
    )
    if pre is not None:
        pre.close()
    return found


best = {}
for method, rates in RATES.items():
    for batch_size in BATCHES:
        if method == "batch norm" and batch_size == 1:
            continue  # the variance of one example is zero: torch refuses
        runs = [run(method, batch_size, lr) for lr in rates]
        kept = [r.final["accuracy"] if r.finished else 0.0 for r in runs]
        best[method, batch_size] = max(kept)
        print(f"{method:>10}, batch {batch_size:>2}: accuracy {max(kept):.3f} at rate {rates[kept.index(max(kept))]}")

# %%
figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
for method, marker in zip(RATES, "os^", strict=True):
    sizes = [size for size in BATCHES if (method, size) in best]
    ax.plot(sizes, [best[method, size] for size in sizes], marker=marker, label=method)
ax.set_xscale("log")
ax.set_xticks(BATCHES, [str(size) for size in BATCHES])
ax.set_xlabel("batch size")
ax.set_ylabel("test accuracy after 2 epochs")
legend = ax.legend(frameon=False)

# %% [markdown]
# ## Statistics from single examples (T4)
#
# One row has no variance, so averages of within-batch variances are zero. `variance="total"`, the default, adds what
# the mean moved: the law of total variance. Fed one row at a time without any update of the weights, the statistics
# approach those of the whole set. The paper's form, `BNP.paper`, takes $(h - \mu)^2$ with the running mean instead.
# Plain averages within batches, `variance="within"`, are refused at one row, with the reason.

# %%
model = network()
pre = bnp.BNP(model, rho=0.995)
for i in torch.randperm(len(train.x), generator=order).repeat(2):
    model.zero_grad()
    cross_entropy(model(train.x[i : i + 1]), train.y[i : i + 1]).backward()
    pre.step()
risk = bnp.EmpiricalRisk(model, cross_entropy, train.tensors)
seen, exact = pre.preconditioner(risk.space), bnp.bnp_preconditioner(risk, eps1=1e-2, eps2=1e-4)
g = risk.gradient
agreement = float(torch.nn.functional.cosine_similarity(seen.direction(g), exact.direction(g), dim=0))
print(f"cosine between the step with running and with exact statistics: {agreement:.4f}")
pre.close()

try:
    with bnp.BNP(model, variance="within") as within:
        cross_entropy(model(train.x[:1]), train.y[:1]).backward()
        within.step()
    refused = ""
except bnp.errors.InvalidInputError as error:
    refused = str(error)
print(refused)

# %% [markdown]
# ## Online: a stream whose inputs move
#
# One example at a time, each seen once, while the brightness of the camera drifts: 1 is added to every pixel over the
# stream. Running means follow; a common shift of a layer's inputs is exactly what centring takes out.


# %%
def stream(lr, precondition):
    model = network()
    pre = bnp.BNP(model, rho=0.99) if precondition else None
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    order, right = torch.Generator().manual_seed(1), []
    for t, i in enumerate(torch.randperm(len(train.x), generator=order)):
        x, y = train.x[i : i + 1] + t / len(train.x), train.y[i : i + 1]
        output = model(x)
        right.append(float(output.argmax() == y))  # before the example is learned
        optimizer.zero_grad()
        cross_entropy(output, y).backward()
        if pre is not None:
            pre.step()
        optimizer.step()
    if pre is not None:
        pre.close()
    return sum(right[len(right) // 2 :]) / (len(right) // 2)


online = {
    name: max(stream(lr, name == "BNP") for lr in rates)
    for name, rates in {"plain": (0.01, 0.03, 0.1), "BNP": (0.01, 0.03, 0.1)}.items()
}
for name, value in online.items():
    print(f"{name:>6}: {value:.3f} of the second half predicted right before they were learned")

# %% [markdown]
# ## In a loop that is not yours
#
# `attach` puts BNP before each step of an optimizer, for trainers that step where you do not see it.

# %%
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
pre = bnp.BNP(model).attach(optimizer)


def somebody_elses_trainer(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


somebody_elses_trainer(model, optimizer, list(zip(train.x.split(16), train.y.split(16), strict=True)) * 4)
attached = accuracy(model)
print(f"accuracy {attached:.3f}; {pre}")

# %% [markdown]
# ## What trains is what is measured
#
# `pre.preconditioner()` is accepted wherever `preconditioner=` is. Damped as it trains, on the last layer:

# %%
risk = bnp.EmpiricalRisk(model, cross_entropy, train.tensors, dtype=torch.float64)
A, N = bnp.gauss_newton(risk, block="fc3"), bnp.null_directions(risk, block="fc3")
plain = bnp.condition_number(A, null=N)
trained = bnp.condition_number(A, null=N, preconditioner=pre.preconditioner(risk.space).block("fc3"))
print(plain)
print(trained)
pre.close()

# %% [markdown]
# The claims of this page, asserted:

# %%
assert same_inference
assert best["BNP", 1] > 0.7
assert best["BNP", 6] > 0.7
assert best["BNP", 60] > best["plain", 60]
assert ("batch norm", 1) not in best
assert agreement > 0.9
assert "variance='within' on one row" in refused
assert online["BNP"] > online["plain"]
assert attached > 0.7
assert plain.two_sided
assert trained.two_sided
assert trained.value < plain.value / 3
