"""The condition number of the Gauss-Newton matrix of a linear network against that of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mpmath
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from paper_figures.gallery import Entry, Row, Settings

INPUTS, HIDDEN, OUTPUTS, EXAMPLES = 10, 16, 3, 50


def measure(settings: Settings) -> Iterator[Row]:
    """For each condition number of the inputs' second moments, the two routines of the source."""
    for spread in settings["spreads"]:
        g = torch.Generator().manual_seed(settings["seed"])
        model = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False), nn.Linear(HIDDEN, OUTPUTS, bias=False)).double()
        for layer in model:
            nn.init.kaiming_normal_(layer.weight, generator=g)
        x = torch.linalg.qr(torch.randn(EXAMPLES, INPUTS, generator=g, dtype=torch.float64))[0]
        turn = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=g, dtype=torch.float64))[0]
        x = EXAMPLES**0.5 * x * torch.logspace(0, -0.5, INPUTS, base=spread, dtype=torch.float64) @ turn.T
        risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, torch.zeros(EXAMPLES, OUTPUTS).double()))
        found = bnp.condition_number(bnp.gauss_newton(risk), null=bnp.null_directions(risk))
        v, w = (layer.weight.detach() for layer in model)
        bounds: dict[str, Any] = {"lower": found.lower, "upper": found.upper, "exact": float(_exact(v, w, x))}
        second = x.T @ x / EXAMPLES
        product = torch.kron(w @ w.T, second) + torch.kron(torch.eye(OUTPUTS).double(), v.T @ v @ second)
        case, white = f"inputs {spread:.0e}".replace("e+0", "e"), spread == 1
        yield Row(case=f"{case}, cond", reported=float(torch.linalg.cond(product)), agrees=white or None, **bounds)
        sizes = torch.linalg.eigvalsh(product).abs().sort().values
        rank = int(torch.linalg.matrix_rank(product, atol=1e-7))
        yield Row(case=f"{case}, eigvalsh", reported=float(sizes[-1] / sizes[-rank]), agrees=white, **bounds)


def _exact(v: Tensor, w: Tensor, x: Tensor) -> mpmath.mpf:
    """The ratio of the eigenvalues of `(I x L)^T (W W^T x I + I x V^T V) (I x L)`, `L L^T = X^T X`, with 50 digits."""
    with mpmath.workdps(50):
        V, W, X = (mpmath.matrix(t.tolist()) for t in (v, w, x))
        L = mpmath.cholesky(X.T * X)
        inner, outer, gram = L.T * V.T * V * L, W * W.T, L.T * L
        n = INPUTS
        A = mpmath.matrix(OUTPUTS * n)
        for i in range(OUTPUTS):
            for j in range(OUTPUTS):
                block = outer[i, j] * gram + (inner if i == j else 0 * inner)
                for a in range(n):
                    for b in range(n):
                        A[i * n + a, j * n + b] = block[a, b]
        values = mpmath.eigsy(A, eigvals_only=True)
        return max(values) / min(values)


ENTRY = Entry(
    title="Gauss-Newton matrix of a linear network",
    source=(
        "J. Zhao, S. P. Singh, A. Lucchi, *Theoretical characterisation of the Gauss-Newton conditioning in Neural "
        "Networks*, NeurIPS 2024 (arXiv 2411.02139), Lemma 2 and Figure 2; its experiment code for linear networks, "
        "`calc_cond_num_outer_prod_hess_explicit_linearNN`. Most published curves are for whitened inputs, the first "
        "case here; one figure compares them with inputs that are not whitened."
    ),
    setting=(
        f"Linear network {INPUTS}-{HIDDEN}-{OUTPUTS}, Kaiming normal, squared loss, {EXAMPLES} inputs whose second-"
        "moment matrix `S` has condition number 1, 1e2, 1e6. These inputs are ours; the source uses images."
    ),
    naive=(
        "the nonzero eigenvalues are those of `kron(W W^T, S) + kron(I, V^T V S)`, which is not symmetric unless `S` "
        "is a multiple of the identity. The code applies `linalg.cond` to this matrix. Commented lines next to it, and "
        "the variant for convolutions, use `|eigvalsh|` above a threshold for the rank. In float64."
    ),
    certified="`condition_number(gauss_newton(risk), null=null_directions(risk))`: singular values of the factor.",
    check="the same matrix, made symmetric by a Cholesky factor of `S`, with 50 digits.",
    why=(
        "For a nonsymmetric matrix, `cond` returns the ratio of singular values, which is not that of eigenvalues, and "
        "`eigvalsh` reads one triangle only, so that it returns the eigenvalues of another matrix. For whitened inputs "
        "both are right."
    ),
    presets={"quick": {"seed": 0, "spreads": [1.0, 1e6]}, "full": {"seed": 0, "spreads": [1.0, 1e2, 1e6]}},
    measure=measure,
)
