#!/usr/bin/env bash
# pyDVL 0.10.0: `SecondOrderMode.GAUSS_NEWTON` inverts a matrix that depends on the number of parameters, of batches and
# of points asked about.
#
# The documentation defines it as (1/N) sum_i g_i g_i^T, with g_i the gradient of example i. Two averages over batches
# take their weights from the first dimension of tensors that have no dimension of examples any more, and both treat the
# first batch apart:
#   * `gauss_newton`, which `DirectInfluence` uses, adds up the batches' P x P matrices and divides by P (B - 1), for P
#     parameters and B batches; with one batch it divides by zero.
#   * `GaussNewtonOperator`, which `CgInfluence`, `NystroemSketchInfluence` and others use, multiplies k vectors at once
#     by (G_1 + k G_2 + ... + k G_B) / (k B), with the batches' own means G_b, and one vector alone by the same with
#     k = P. The first batch is all but forgotten, a single batch is divided by k, and a vector's product depends on the
#     vectors next to it: with simultaneous solves the influence of a test point is another one when other points are
#     asked about in the same call. `InverseHarmonicMeanInfluence` averages in the same way.
# Nothing is said, apart from nan where the divisor is zero. Three documented ways to invert the same damped matrix are
# off here by 18 to 360 percent and disagree with each other; each returns, to rounding, the inverse of the matrix
# above. The Hessian mode of the same calls is right. Since the damping does not scale along, rankings change too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==1.26.4 scipy==1.15.3 packaging==25.0 pandas==2.2.3 scikit-learn==1.6.1 joblib==1.4.2 \
    more-itertools==10.7.0 tqdm==4.67.1 dask==2025.3.0 distributed==2025.3.0 zarr==3.0.8 numcodecs==0.15.1
pip --no-deps pyDVL==0.10.0 pyDeprecate==0.3.2
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from pydvl.influence.torch import (
    CgInfluence, DirectInfluence, InverseHarmonicMeanInfluence, NystroemSketchInfluence, SecondOrderMode
)
from pydvl.influence.torch.functional import gauss_newton
from pydvl.influence.torch.operator import GaussNewtonOperator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
print("torch", version("torch"), "pyDVL", version("pyDVL"))
N, DAMPING = 12, 0.1
draw = torch.Generator().manual_seed(0)
x, y = torch.randn(N, 4, generator=draw), torch.randint(3, (N,), generator=draw)
torch.manual_seed(0)
net, loss = nn.Linear(4, 3), nn.functional.cross_entropy
parameters = list(net.parameters())
P = sum(p.numel() for p in parameters)
damping = DAMPING * torch.eye(P)


def flat_gradient(value, **options):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, **options)])


gradients = torch.stack([flat_gradient(loss(net(x[i : i + 1]), y[i : i + 1])) for i in range(N)])
truth = gradients.T @ gradients / N
whole = flat_gradient(loss(net(x), y), create_graph=True)
hessian = torch.stack([flat_gradient(entry, retain_graph=True) for entry in whole])


def off(A, B):
    return float((A - B).norm() / B.norm())


def influence(kind, loader, points, **options):
    """Inverse matrix times the gradients of the first points, as the documented interface returns it."""
    torch.manual_seed(0)
    model = kind(net, loss, regularization=DAMPING, **options).fit(loader)
    return model.influence_factors(x[:points], y[:points])


def solved(matrix, points):
    return torch.linalg.solve(matrix + damping, gradients[:points].T).T


for size in (12, 6, 3, 1):
    loader = DataLoader(TensorDataset(x, y), batch_size=size)
    batches = N // size
    means = torch.stack([g.T @ g / size for g in gradients.split(size)])

    def counted(k):
        """What the operator multiplies k vectors by."""
        return (means[0] + k * means[1:].sum(dim=0)) / (k * batches)

    print(f"{batches} batches of {size}")
    dense = gauss_newton(net, loss, loader)
    print(f"  gauss_newton: {float(dense[0, 0] / truth[0, 0]):.3g} times the right matrix")
    if batches == 1:
        assert bool(dense.isinf().all()) and bool(influence(
            DirectInfluence, loader, 3, second_order_mode=SecondOrderMode.GAUSS_NEWTON
        ).isnan().all())
    else:
        assert off(dense, truth * N / (P * (batches - 1))) < 1e-12
    operator, vectors = GaussNewtonOperator(net, loss, loader), torch.eye(P)
    assert off(operator.apply(vectors[:1]), vectors[:1] @ truth) < 1e-12  # right for one vector in a matrix of one row
    for k in (2, 5):
        assert off(operator.apply(vectors[:k]), vectors[:k] @ counted(k)) < 1e-12
    single, among = operator.apply(vectors[0]), operator.apply(vectors[:5])[0]
    print(f"  operator on a vector: {float(single.norm() / truth[0].norm()):.3g} of the right length, on the same "
          f"vector among five: {float(among.norm() / truth[0].norm()):.3g}")
    assert off(single, counted(P) @ vectors[0]) < 1e-12 and off(single, among) > 0.01
    exact = {"rtol": 1e-12, "atol": 1e-13}
    together = {**exact, "solve_simultaneously": True}
    for name, kind, used, options in (
        ("direct", DirectInfluence, dense, {}),
        ("conjugate gradients", CgInfluence, counted(P), exact),
        ("conjugate gradients, together", CgInfluence, counted(3), together),
        ("Nystroem, full rank", NystroemSketchInfluence, counted(P), {"rank": P}),
    ):
        if bool(used.isinf().any()):
            continue
        found = influence(kind, loader, 3, second_order_mode=SecondOrderMode.GAUSS_NEWTON, **options)
        print(f"  {name:29} three influences off by {off(found, solved(truth, 3)):.2g}, "
              f"from the wrong matrix's by {off(found, solved(used, 3)):.1g}")
        assert off(found, solved(used, 3)) < 1e-6 and off(found, solved(truth, 3)) > 0.1
        if kind is not NystroemSketchInfluence:
            assert off(influence(kind, loader, 3, **options), solved(hessian, 3)) < 1e-6  # the Hessian mode is right
    alone = influence(CgInfluence, loader, 1, second_order_mode=SecondOrderMode.GAUSS_NEWTON, **together)[0]
    company = influence(CgInfluence, loader, 5, second_order_mode=SecondOrderMode.GAUSS_NEWTON, **together)[0]
    print(f"  one point's influence, asked with four others, changes by {off(company, alone):.2g}")
    assert off(alone, solved(truth, 1)[0]) < 1e-6 and off(company, alone) > 0.1
    harmonic = [influence(InverseHarmonicMeanInfluence, loader, k)[0] for k in (1, 5)]
    print(f"  inverse harmonic mean: the same, by {off(harmonic[1], harmonic[0]):.2g}")
    assert off(harmonic[1], harmonic[0]) > 1e-3
print("as described")
PYTHON
