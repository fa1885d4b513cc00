"""The list of matrix problems of the truth suite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from truth_problems import (
    ALL,
    Problem,
    badly_given,
    cancelling,
    conditioned,
    constructed,
    declared_small,
    far_apart,
    far_from_one,
    hidden_cast,
    random_problem,
    stored_matrix,
    undeclared_null_space,
)

from bnp_analysis.testing import KINDS


def problems() -> Iterator[Problem]:
    """All matrix problems."""
    for kind, es in {
        "log": (5, 10, 17, 20, 23),
        "isolated": (10, 20, 23),
        "clustered": (10, 20),
        "repeated": (10, 20),
        "two-scale": (10, 20, 23),
        "flat": (0,),
    }.items():
        for e in es:
            name = f"{kind}, n 64, kappa {4.0**e:.1g}"
            yield Problem("constructed", name, constructed(kind, 64, e), quick=e in (0, 20))
    yield from shapes_and_scales()
    yield from other_ways()
    yield from extremes()


def shapes_and_scales() -> Iterator[Problem]:
    """Ranks, scales, sizes, single precision, stored matrices; all constructed."""
    f32, few = torch.float32, ("factor-svd", "golub-kahan", "dense", "lanczos")
    for rank in (63, 14, 1):
        for e in (10, 20) if rank > 1 else (0,):
            for declared in (False, True):
                name = f"log, n 64, rank {rank}, kappa {4.0**e:.1g}, null space {'declared' if declared else 'unknown'}"
                make = constructed("log", 64, e, rank=rank, declared=declared)
                yield Problem("constructed, rank-deficient", name, make, quick=rank == 14)
    for shift in (-23, 23):
        for kind in ("log", "isolated"):
            name = f"{kind}, n 64, kappa 1e12, scale {4.0**shift:.0e}"
            yield Problem("constructed, scaled", name, constructed(kind, 64, 20, shift=shift), quick=kind == "log")
    for n in (1, 4, 16, 50, 256):
        make = constructed("log", n, 10 if n > 1 else 0)
        yield Problem("constructed, sizes", f"log, n {n}, kappa {1e6 if n > 1 else 1:.0e}", make, quick=n < 50)
    yield Problem("constructed, sizes", "log, n 1024, kappa 1e+06", constructed("log", 1024, 10, methods=few))
    large = constructed("log", 3000, 10, rank=400, rows=400, methods=("factor-svd", "golub-kahan", "lanczos"))
    yield Problem("constructed, sizes", "log, 400 x 3000, kappa 1e+06", large)
    square = constructed("two-scale", 3000, 10, methods=("factor-svd",))
    yield Problem("constructed, sizes", "two-scale, n 3000, kappa 1e+06", square)
    for rows, n in ((256, 64), (64, 256)):
        name = f"log, {rows} x {n}, kappa 1e12"
        yield Problem("constructed, sizes", name, constructed("log", n, 20, rank=64, rows=rows), quick=True)
    for kind, n, e in (("log", 16, 5), ("log", 16, 10), ("log", 16, 18), ("isolated", 16, 20), ("repeated", 64, 18)):
        make = constructed(kind, n, e, dtype=f32, methods=few)
        yield Problem("constructed, float32", f"{kind}, n {n}, kappa {4.0**e:.1g}", make, quick=n == 16)
    for kind, e, negative in (("log", 5, 0), ("isolated", 10, 0), ("log", 10, 6), ("two-scale", 10, 9), ("log", 16, 5)):
        name = f"{kind}, n 16, kappa {4.0**e:.1g}, {negative} negative"
        yield Problem("stored matrix, no factor", name, stored_matrix(kind, 16, e, negative), quick=e < 16)


def other_ways() -> Iterator[Problem]:
    """Random singular vectors, preconditioners, undeclared null spaces, shifts."""
    f32, few = torch.float32, ("factor-svd", "golub-kahan", "dense", "lanczos")
    for kind in KINDS:
        for kappa in (1e4, 1e8, 1e12, 1e14) if kind != "flat" else (1.0,):
            methods = (*ALL, "inverse-lanczos") if kappa <= 1e4 else ALL
            make = random_problem(kind, kappa, methods=methods)
            yield Problem("random vectors", f"{kind}, 50 x 40, kappa {kappa:.0e}", make, quick=kappa == 1e12)
    for kappa in (1e4, 1e8, 1e12):
        for given in (True, False):
            make = random_problem("log", kappa, (30, 20), dtype=f32, given=given, methods=few)
            rows_are = "stored" if given else "computed"
            yield Problem("random vectors, float32", f"log, 30 x 20, kappa {kappa:.0e}, rows {rows_are}", make, True)
    for norm in (1e1, 1e3, 1e5):
        for kappa in (1e2, 1e6):
            for seed in (1, 2, 3):
                name = f"dense P, |P| {norm:.0e}, kappa {kappa:.0e}, seed {seed}"
                make = conditioned(norm, kappa, seed)
                yield Problem("P^T A P", name, make, quick=seed == 1 and norm == 1e5)
        yield Problem("P^T A P", f"diagonal P, |P| {norm:.0e}, kappa 1e+06", conditioned(norm, 1e6, 4, diagonal=True))
    for norm in (1e1, 1e3):
        name = f"dense P, |P| {norm:.0e}, kappa 1e+02, float32"
        yield Problem("P^T A P", name, conditioned(norm, 1e2, 5, dtype=f32))
    for steps in (60, 100, 150):
        for known in (0, 25, 50):
            name = f"{steps} steps, {known} of 50 null directions known"
            yield Problem("undeclared null space", name, undeclared_null_space(steps, known), quick=steps == 100)
    for delta in (1e-3, 1e-1):
        methods = ("factor-svd", "golub-kahan", "dense", "inertia", "lanczos", "inverse-lanczos")
        make = random_problem("log", 1e8, (30, 40), delta=delta, methods=methods)
        yield Problem("regularized", f"log, 30 x 40, kappa 1e8, delta {delta:g}", make, quick=delta == 1e-1)


def extremes() -> Iterator[Problem]:
    """Scales of all floats, products that cancel, hidden casts, declared directions that are wrong or badly given."""
    f32 = torch.float32
    for kind in ("log", "repeated"):
        for power in (-990, -500, -330, 330, 500, 1000):
            for stored in ("factor", "matrix", "function"):
                make = far_from_one(kind, power, stored=stored)
                yield Problem("scales", f"{kind}, {stored}, times 2^{power}", make, quick=kind == "log")
        for power in (-110, -70, 60, 120):
            make = far_from_one(kind, power, dtype=f32)
            yield Problem("scales, float32", f"{kind}, factor, times 2^{power}", make, quick=kind == "log")
    for values, scale in (((1e200, 1e-150), 1.0), ((1.0, 0.5, 1e-60), 1e-140), ((1.0, 0.5, 1e-3), 1e140)):
        for factor in (False, True):
            name = f"diag{values}, P {scale:.0e}, {'factor' if factor else 'matrix'}"
            yield Problem("entries far apart", name, far_apart(values, scale, factor=factor), quick=True)
    for K in (1e8, 1e12, 1e16):
        yield Problem("cancelling products", f"F P of rank 3, K {K:.0e}", cancelling(K), quick=True)
    for e in (2, 6, 10):
        for dtype in (f32, torch.float16, torch.bfloat16):
            name = f"kappa {4.0**e:.1g}, {str(dtype).removeprefix('torch.')} inside float64"
            yield Problem("hidden casts", name, hidden_cast(e, dtype), quick=e == 6)
    for small, dtype in ((1e-14, torch.float64), (1e-10, torch.float64), (2e-5, f32), (1e-6, f32)):
        for factor in (False, True):
            name = f"diag(1, 1/2, {small:.0e}) with e3 declared, {str(dtype)[-7:]}, {'factor' if factor else 'matrix'}"
            yield Problem("declared directions", name, declared_small(small, factor=factor, dtype=dtype), quick=True)
    for offset, length in ((0.0, 1.0), (1e3, 1.0), (1e6, 1.0), (1e9, 1.0), (1e6, 1e300), (1e6, 1e-290)):
        name = f"1 and {offset:.0e} + (0, 1), times {length:.0e}"
        yield Problem("declared directions", name, badly_given(offset, length), quick=True)
