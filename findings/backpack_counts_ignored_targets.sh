#!/usr/bin/env bash
# BackPACK 1.7.1: targets that cross-entropy ignores (-100, torch's default `ignore_index`) are counted, as if the model
# had been trained on them, and averages are over all examples instead of those that are left.
#
# BackPACK refuses any `ignore_index` but the default and says so; with the default it accepts targets that carry it.
# Its square root of the loss's Hessian has a block for every row of outputs, ignored or not, and divides by the number
# of rows, where torch's mean divides by the number of rows that count. The diagonal of the Gauss-Newton matrix is
# therefore, to rounding, the one without ignored targets, whatever is ignored; its sampled version likewise, and the
# diagonal of the Hessian is wrong too. Nothing is said. First derivatives are right: gradients per example add up to
# the gradient and vanish for ignored rows. Sizes stay plausible, so that nobody notices: with two of six targets
# ignored the diagonal is off by four percent here, with five of six by a quarter. Masked language models and
# segmentation labels have such targets.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.2.6 packaging==25.0
pip --no-deps backpack-for-pytorch==1.7.1 einops==0.8.2 unfoldNd==0.2.3
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, DiagGGNMC, DiagHessian
from torch import nn
from torch.func import functional_call

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
print("torch", version("torch"), "backpack-for-pytorch", version("backpack-for-pytorch"))
draw = torch.Generator().manual_seed(0)
x = torch.randn(6, 4, generator=draw)
IGNORED = -100


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))


def truth(y):
    """Diagonals of the Gauss-Newton matrix and of the Hessian of the mean loss, by differentiating twice."""
    net = network()
    parameters = dict(net.named_parameters())

    def outputs(*values):
        return functional_call(net, dict(zip(parameters, values)), (x,))

    point = tuple(parameters.values())
    J = torch.cat([r.flatten(2) for r in torch.autograd.functional.jacobian(outputs, point)], dim=2).flatten(0, 1)
    z = outputs(*point).detach()
    loss = nn.functional.cross_entropy
    S = torch.autograd.functional.hessian(lambda z: loss(z, y), z).reshape(18, 18)
    blocks = torch.autograd.functional.hessian(lambda *values: loss(outputs(*values), y), point)
    hessian = [blocks[i][i].reshape(p.numel(), p.numel()).diagonal() for i, p in enumerate(point)]
    return torch.einsum("ki,kl,li->i", J, S, J), torch.cat(hessian)


def off(A, B):
    return float((A - B).norm() / B.norm())


unmasked = None
for y in (
    torch.tensor([0, 1, 2, 1, 2, 0]),
    torch.tensor([0, IGNORED, 2, 1, IGNORED, 0]),
    torch.tensor([IGNORED, IGNORED, 2, IGNORED, IGNORED, IGNORED]),
):
    net, loss = extend(network()), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact(), DiagHessian(), BatchGrad(), DiagGGNMC(mc_samples=4000)):
        loss(net(x), y).backward()
    parts = list(net.parameters())
    ggn, hessian = (torch.cat([getattr(p, name).flatten() for p in parts]) for name in ("diag_ggn_exact", "diag_h"))
    sampled = torch.cat([p.diag_ggn_mc.flatten() for p in parts])
    right = truth(y)
    ignored = int((y == IGNORED).sum())
    print(f"{ignored} of 6 ignored: diagonal of the Gauss-Newton matrix off by {off(ggn, right[0]):.2g}, sampled "
          f"{off(sampled, right[0]):.2g}, of the Hessian {off(hessian, right[1]):.2g}")
    for p in parts:
        assert torch.allclose(p.grad_batch.sum(dim=0), p.grad, atol=1e-14)
        assert float(p.grad_batch[y == IGNORED].abs().sum()) == 0.0
    for error in (off(ggn, right[0]), off(hessian, right[1])):
        assert error > 0.02 if ignored else error < 1e-12
    unmasked = ggn if unmasked is None else unmasked
    assert off(ggn, unmasked) < 1e-12 and off(sampled, ggn) < 0.1
print("as described")
PYTHON
