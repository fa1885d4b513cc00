#!/usr/bin/env bash
# BackPACK 1.7.1, curvlinops 3.0.1, NNGeometry 0.4 and Opacus 1.6.0: what is computed for a convolution's parameters
# belongs to zero padding, whatever `padding_mode` says.
#
# All four see a convolution through hooks: its input, its output's gradient, and the module's attributes `stride`,
# `padding`, `dilation`, `groups`. They cut patches out of the input again, with zeros around it. A layer with
# padding_mode "reflect", "replicate" or "circular" pads in its forward pass before it convolves, and `padding` still
# holds the same numbers, so the patches at the border are others than those the layer saw. No error, no warning:
# per-example gradients, diagonals and dense Gauss-Newton matrices and Kronecker factors are off by 0.1 to 90 percent
# here, while the same calls are right to rounding with zero padding. The reference is automatic differentiation of the
# same network. Four libraries forgot the same attribute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.2.6 scipy==1.15.3 tqdm==4.67.1 packaging==25.0
pip --no-deps backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 nngeometry==0.4 opacus==1.6.0 \
    einops==0.8.2 einconv==0.1.0 unfoldNd==0.2.3 opt_einsum==3.4.0 linear_operator==0.6.1 jaxtyping==0.3.11 \
    wadler_lindig==0.1.8 mpmath==1.3.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact
from curvlinops import KFACLinearOperator
from nngeometry.metrics import FIM
from nngeometry.object import PMatDiag
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
for name in ("torch", "backpack-for-pytorch", "curvlinops-for-pytorch", "nngeometry", "opacus"):
    print(name, version(name))

N, CLASSES = 6, 3
draw = torch.Generator().manual_seed(0)
x, y = torch.randn(N, 2, 6, 6, generator=draw), torch.randint(CLASSES, (N,), generator=draw)


def network(mode):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, CLASSES)
    )


def jacobian(net, data):
    parameters = dict(net.named_parameters())

    def outputs(*values):
        return functional_call(net, dict(zip(parameters, values)), (data,))

    rows = torch.autograd.functional.jacobian(outputs, tuple(parameters.values()))
    return torch.cat([r.flatten(2) for r in rows], dim=2)


def gauss_newton(net):
    """Of the mean cross-entropy, by differentiating the network itself."""
    J, p = jacobian(net, x), net(x).softmax(dim=1).detach()
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nci,ncd,ndj->ij", J, S, J) / N


def example_gradients(net):
    residual = (net(x).softmax(dim=1) - nn.functional.one_hot(y, CLASSES)).detach()
    return torch.einsum("nc,nci->ni", residual, jacobian(net, x))


def off(A, B):
    return float((A - B).norm() / B.norm())


def by_backpack(mode):
    net, loss = extend(network(mode)), extend(nn.CrossEntropyLoss())
    with backpack(BatchGrad(), DiagGGNExact()):
        loss(net(x), y).backward()
    gradients = torch.cat([p.grad_batch.flatten(1) for p in net.parameters()], dim=1)
    diagonal = torch.cat([p.diag_ggn_exact.flatten() for p in net.parameters()])
    plain = network(mode)
    return {
        "BackPACK, gradients per example": off(gradients, example_gradients(plain) / N),
        "BackPACK, diagonal of the Gauss-Newton matrix": off(diagonal, gauss_newton(plain).diagonal()),
    }


def by_opacus(mode):
    net = network(mode)
    wrapped = GradSampleModule(net)
    nn.CrossEntropyLoss()(wrapped(x), y).backward()
    found = torch.cat([p.grad_sample.flatten(1) for p in net.parameters()], dim=1)
    return {"Opacus, gradients per example": off(found, example_gradients(network(mode)))}


def by_nngeometry(mode):
    net, loader = network(mode), DataLoader(TensorDataset(x, y), batch_size=N)
    found = FIM(net, loader, PMatDiag, variant="classif_logits")
    # Its parameters may be in another order: traces do not depend on it.
    trace, truth = float(found.trace()), float(gauss_newton(network(mode)).trace())
    return {"NNGeometry, trace of the Fisher matrix": abs(trace - truth) / truth}


def by_curvlinops(mode):
    """One example and one output position: there the Kronecker factorization is exact."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=3, padding=1, padding_mode=mode), nn.Flatten(), nn.Linear(4, 3))
    image, target = x[:1, :, :3, :3], torch.zeros(1, 3)
    parameters = list(net[0].parameters())
    found = KFACLinearOperator(
        net, nn.MSELoss(), parameters, [(image, target)], fisher_type="type-2", separate_weight_and_bias=False,
        check_deterministic=False,
    )
    size = sum(p.numel() for p in parameters)
    J = jacobian(net, image)[0, :, :size]
    return {"curvlinops, Kronecker factors": off(found @ torch.eye(size), 2 / 3 * J.T @ J)}


for mode in ("zeros", "reflect", "replicate", "circular"):
    for library in (by_backpack, by_opacus, by_nngeometry, by_curvlinops):
        for what, error in library(mode).items():
            print(f"{mode:9} {what:46} off by {error:.2g}")
            assert error < 1e-10 if mode == "zeros" else error > 1e-3, (mode, what, error)
print("as described")
PYTHON
