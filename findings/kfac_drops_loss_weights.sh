#!/usr/bin/env bash
# curvlinops 3.0.1: `KFACLinearOperator` accepts losses with weights and computes the curvature of the loss without them.
#
# `weight` and `pos_weight` of BCEWithLogitsLoss and `weight` of CrossEntropyLoss scale the loss of every example or
# class, and so its Hessian. The Kronecker factors are made from the square root of the unweighted loss's Hessian. For
# one example and one linear layer a Kronecker factorization is exact, so that it can be compared with the Gauss-Newton
# matrix: without weights the two agree to rounding, with weights KFAC returns the very matrix of the unweighted loss.
# `GGNLinearOperator` of the same package is right for all of these losses, so the package contradicts itself; label
# smoothing is treated correctly by both. Nothing is said, though targets that are not binary are refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.2.6 scipy==1.15.3 tqdm==4.67.1 packaging==25.0
pip --no-deps backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 einops==0.8.2 einconv==0.1.0 unfoldNd==0.2.3 \
    opt_einsum==3.4.0 linear_operator==0.6.1 jaxtyping==0.3.11 wadler_lindig==0.1.8 mpmath==1.3.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from curvlinops import GGNLinearOperator, KFACLinearOperator
from torch import nn

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
print("torch", version("torch"), "curvlinops", version("curvlinops-for-pytorch"))
torch.manual_seed(0)
net = nn.Linear(4, 3)
x, binary, label = torch.randn(1, 4), torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([2])
weights, parameters = torch.tensor([1.0, 2.0, 5.0]), list(net.parameters())


def hessian_in_outputs(loss, y):
    z = net(x).detach().requires_grad_()
    return torch.autograd.functional.hessian(lambda z: loss(z, y), z).reshape(3, 3)


def truth(loss, y):
    """J^T S J with J = I (x) [x, 1], in the order weight, bias."""
    J = torch.cat([torch.kron(torch.eye(3), x), torch.eye(3)], dim=1)
    return J.T @ hessian_in_outputs(loss, y) @ J


def dense(kind, loss, y, **options):
    return kind(net, loss, parameters, [(x, y)], check_deterministic=False, **options) @ torch.eye(15)


def off(A, B):
    return float((A - B).norm() / B.norm())


cases = {
    "BCE": (nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(), binary),
    "BCE, weight": (nn.BCEWithLogitsLoss(weight=weights), nn.BCEWithLogitsLoss(), binary),
    "BCE, pos_weight": (nn.BCEWithLogitsLoss(pos_weight=weights), nn.BCEWithLogitsLoss(), binary),
    "cross-entropy": (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum"), label),
    "cross-entropy, weight": (
        nn.CrossEntropyLoss(weight=weights, reduction="sum"), nn.CrossEntropyLoss(reduction="sum"), label
    ),
    "cross-entropy, label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), nn.CrossEntropyLoss(reduction="sum"), label
    ),
}
for name, (loss, unweighted, y) in cases.items():
    kfac = dense(KFACLinearOperator, loss, y, fisher_type="type-2", separate_weight_and_bias=False)
    ggn, exact, plain = dense(GGNLinearOperator, loss, y), truth(loss, y), truth(unweighted, y)
    print(f"{name:31} KFAC off by {off(kfac, exact):.2g}, from the unweighted loss's by {off(kfac, plain):.1g}; "
          f"GGN off by {off(ggn, exact):.1g}")
    assert off(ggn, exact) < 1e-12 and off(kfac, plain) < 1e-12
    assert (off(kfac, exact) > 0.1) == ("weight" in name)
print("as described")
PYTHON
