#!/usr/bin/env bash
# torch 2.13.0 (CPU): the second derivative of weight normalization is wrong, and no error says so.
#
# `torch.nn.utils.parametrizations.weight_norm` runs one fused operation where the kept dimension is the first or the
# last. Its first derivatives are right. Its backward pass, differentiated again, uses the row norms that the forward
# pass saved and treats them as constants, although they depend on the direction `v`. Every second derivative with
# respect to `v` then lacks terms: for w = g v / |v| the blocks (v, v) and (g, v) of a Hessian are wrong, the blocks
# (v, g) and (g, g) are right, so that the Hessian is not even symmetric. Gradient penalties, Hessian-vector products,
# meta-learning and Laplace approximations of models with weight normalization inherit the error silently.
# Seen here: the (v, v) block is off by more than its own norm; the same numbers follow when the primitive gradient
# formula is differentiated with the norms held fixed, which locates the cause. Normalizing along a middle dimension
# takes another path and is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.set_num_threads(1)
print("torch", torch.__version__)
draw = torch.Generator().manual_seed(0)
v = torch.randn(3, 4, generator=draw, dtype=torch.float64)
g = torch.rand(3, 1, generator=draw, dtype=torch.float64) + 0.5


def outer(w):
    return w.sin().square().sum()


def fused(v, g):
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3, bias=False, dtype=torch.float64))
    names = [f"parametrizations.weight.original{k}" for k in (0, 1)]
    # original0 is g, original1 is v; the identity matrix as input gives the weight itself.
    return torch.func.functional_call(layer, dict(zip(names, (g, v))), torch.eye(4, dtype=torch.float64)).T


def primitive(v, g):
    return g * v / v.square().sum(dim=1, keepdim=True).sqrt()


def gradient(weight):
    def of(v, g):
        return torch.autograd.grad(outer(weight(v, g)), (v, g), create_graph=True)
    return of


def norms_fixed(v, g):
    """The gradient of the primitive form, written out, with the norms taken for constants."""
    n = v.detach().square().sum(dim=1, keepdim=True).sqrt()
    w = primitive(v, g)
    (u,) = torch.autograd.grad(outer(w), w, create_graph=True)
    along = (u * v).sum(dim=1, keepdim=True)
    return g / n * (u - v * along / n**2), along / n


def blocks(function):
    a, b = v.clone().requires_grad_(), g.clone().requires_grad_()
    rows = function(a, b)
    return [
        [torch.stack([torch.autograd.grad(e, x, retain_graph=True)[0].flatten() for e in row.flatten()]) for x in (a, b)]
        for row in rows
    ]


def quotients():
    """Central differences of the fused first derivative, which is right."""
    step, found = 1e-6, []
    for which in (0, 1):
        columns = []
        for k in range((v, g)[which].numel()):
            ends = []
            for sign in (1, -1):
                moved = [v.clone(), g.clone()]
                moved[which].view(-1)[k] += sign * step
                leaves = [t.requires_grad_() for t in moved]
                ends.append([p.detach().flatten() for p in gradient(fused)(*leaves)])
            columns.append([(p - q) / (2 * step) for p, q in zip(*ends)])
        found.append([torch.stack([c[row] for c in columns], dim=1) for row in (0, 1)])
    return [[found[0][row], found[1][row]] for row in (0, 1)]


def off(A, B):
    return float((A - B).norm() / B.norm())


truth, torchs, fixed, difference = blocks(gradient(primitive)), blocks(gradient(fused)), blocks(norms_fixed), quotients()
names = (("(v, v)", "(v, g)"), ("(g, v)", "(g, g)"))
for i in (0, 1):
    for j in (0, 1):
        print(f"block {names[i][j]}: fused off by {off(torchs[i][j], truth[i][j]):.3g}, "
              f"difference quotients off by {off(difference[i][j], truth[i][j]):.1g}, "
              f"fused against norms held fixed {off(torchs[i][j], fixed[i][j]):.1g}")
        assert off(difference[i][j], truth[i][j]) < 1e-6  # the first derivative is right
        assert (off(torchs[i][j], truth[i][j]) > 0.1) == (j == 0)  # derivatives with respect to v are wrong
        assert off(torchs[i][j], fixed[i][j]) < 1e-12
asymmetry = off(torchs[1][0], torchs[0][1].T)
print(f"asymmetry of the fused Hessian {asymmetry:.3g}")
assert asymmetry > 0.1

# A middle dimension, of a convolution's weight.
kernel = torch.randn(2, 3, 4, generator=draw, dtype=torch.float64).requires_grad_()
sizes = (torch.rand(1, 3, 1, generator=draw, dtype=torch.float64) + 0.5).requires_grad_()
middle, plain = (
    torch.autograd.functional.hessian(lambda a: outer(weight(a)), kernel).flatten()
    for weight in (
        lambda a: torch._weight_norm(a, sizes, 1),
        lambda a: sizes * a / a.square().sum(dim=(0, 2), keepdim=True).sqrt(),
    )
)
print(f"along a middle dimension off by {off(middle, plain):.1g}")
assert off(middle, plain) < 1e-12
print("as described")
PYTHON
