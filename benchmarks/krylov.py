"""Eigenpairs and spectral densities of a network's Hessian: products, time in gradients, residuals checked elsewhere.

    python benchmarks/krylov.py [--threads 1] [--seeds 3] [--quick] [--gpu] [--out DIR]

Writes `krylov.md` and `krylov.json`. The network is 784-100-100-100-10 (64-... on `digits`) with 2048 examples of
MNIST, where `BNP_ANALYSIS_DATA` names its folder, else of the embedded `digits`; measured as it starts, after 12 and
after 60 epochs of SGD. Time is that of the whole call, the recording of graphs included, over one gradient of plain
torch in the same dtype before and after it. Residuals `|A x - theta x| / |theta|` are recomputed by double backward in
float64, by code of this file. *Least* is what a Lanczos run without restarts needs from the same start until its
residuals are small: no method that begins with one vector and learns the matrix by products does better, and it has
seen one copy of each eigenvalue.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from krylov_peers import Network, counted_pyhessian, eigenthings, peers, timed
from scipy.linalg import eigh_tridiagonal
from side_by_side import (
    RESULTS,
    about,
    fix_threads,
    heading,
    installed,
    require_folder,
    require_gpu,
    seconds,
    table,
    write,
)

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.errors import DataNotFoundError
from bnp_analysis.linalg import Tridiagonalization, lanczos

EPOCHS = (0, 12, 60)
#: what is asked: (how many, relative residual, dtype, most products, most gradients).
ASKED = (
    (1, 1e-3, torch.float32, 10, 15),
    (10, 1e-3, torch.float32, 40, 60),
    (10, 1e-6, torch.float64, 45, 90),
)
#: how multiplicity is treated, and where a search starts; the first is the default.
WAYS = (("verify", "auto"), ("verify", "random"), ("trust", "auto"))
DENSITY = {True: 1.9, False: 1.6}  # gradients per probe and step, with and without reorthogonalization


def least(run: Tridiagonalization, k: int, tol: float) -> int | None:
    """Steps until the `k` largest Ritz values of a run without restarts have small residuals."""
    for m in range(k, len(run.alpha)):
        values, vectors = eigh_tridiagonal(run.alpha[:m], run.beta[: m - 1])
        if (np.abs(vectors[-1, -k:]) * run.beta[m - 1] <= tol * np.abs(values[-k:])).all():
            return m
    return None


def searches(network: Network, seeds: int, limit: int) -> Iterator[dict[str, Any]]:
    """Our eigenpairs: a row for each thing asked and each way to treat multiplicity."""
    exact = bnp.hessian(network.risk(torch.float64))
    runs = [lanczos(exact, limit, seed=seed) for seed in range(seeds)]
    for k, tol, dtype, most_products, most_gradients in ASKED:
        unit = network.gradient(dtype)
        seconds(unit, 3)
        fewest = [least(run, k, tol) for run in runs]
        for multiplicity, start in WAYS if k > 1 else WAYS[:2]:
            products, times, residuals, stops = [], [], [], set()
            for seed in range(seeds):
                risk = network.risk(dtype)

                def work(
                    risk: Any = risk,
                    seed: int = seed,
                    how: str = multiplicity,
                    k: int = k,
                    tol: float = tol,
                    g: str = start,
                ) -> Any:
                    return bnp.eigenpairs(bnp.hessian(risk), k, tol=tol, seed=seed, multiplicity=how, start=g)

                found, gradients = timed(unit, work)
                products.append(found.matvecs)
                times.append(gradients)
                residuals.append(max(network.residuals(found.values, found.vectors)))
                stops.add(found.stop)
            yield {
                **{"k": k, "tol": tol, "dtype": str(dtype)[6:], "multiplicity": multiplicity, "start": start},
                **{"products": products, "gradients": times, "residual": max(residuals), "stops": sorted(stops)},
                "least": fewest,
                "target": [most_products, most_gradients],
            }


def densities(network: Network, probes: int, steps: int) -> dict[str, float]:
    """Gradients per probe and step, ours with and without reorthogonalization, and the peers'."""
    unit = network.gradient(torch.float32)
    seconds(unit, 3)
    found = {}
    A = bnp.hessian(network.risk(torch.float32))
    bnp.spectral_density(A, probes=1, steps=3)
    for flag in (True, False):
        settings = {"probes": probes, "steps": steps, "reorthogonalize": flag}
        _, gradients = timed(unit, lambda settings=settings: bnp.spectral_density(A, **settings))
        found["reorthogonalized" if flag else "recurrence alone"] = gradients / probes / steps
    few = min(probes, 2)
    if installed("hessian-eigenthings"):
        from hessian_eigenthings import spectral_density

        _, gradients = timed(
            unit, lambda: spectral_density(eigenthings(network), num_runs=few, lanczos_steps=steps, seed=0)
        )
        found["hessian-eigenthings"] = gradients / few / steps
    if installed("pyhessian"):
        with counted_pyhessian(network) as (measured, _):
            _, gradients = timed(unit, lambda: measured.density(iter=steps, n_v=few))
        found["pyhessian, data"] = gradients / few / steps
    return found


def page(record: dict[str, Any]) -> list[str]:
    """The record as Markdown."""
    lines = heading("Krylov methods on a network's Hessian", record["command"], record["about"])
    lines += [
        f"{record['data']}; products and gradients of time are medians over {record['seeds']} random starts,",
        "in brackets the least and the most. `verify` is the default: a look in a random direction confirms that no",
        "wanted eigenvalue has a further copy. `auto`, the default, starts from the network's gradient, which comes",
        "with the recorded graph, and a random vector as long; *least* is that of the random start.",
        "",
        "## Largest eigenpairs",
        "",
    ]
    head = ["network", "asked", "multiplicity", "start", "products", "least", "gradients"]
    head += ["worst residual", "target", "met"]
    rows = []
    for network, found in record["eigenpairs"].items():
        for one in found:
            products, gradients = statistics.median(one["products"]), statistics.median(one["gradients"])
            met = [products <= one["target"][0], gradients <= one["target"][1], one["residual"] <= one["tol"]]
            known = [m for m in one["least"] if m is not None]
            rows.append(
                [
                    *(network, f"{one['k']} to {one['tol']:g}, {one['dtype']}", one["multiplicity"]),
                    *(one["start"], spread(one["products"], ".0f"), spread(known, ".0f") if known else "more"),
                    *(spread(one["gradients"], ".1f"), f"{one['residual']:.1e}"),
                    *("{}, {}".format(*one["target"]), "yes" if all(met) else "no"),
                ]
            )
    lines += [*table(head, rows), "", f"## Others, {record['peers_at']}", ""]
    found = [[r["name"], str(r["products"]), f"{r['gradients']:.0f}", f"{r['residual']:.1e}"] for r in record["peers"]]
    lines += table(["10 largest to 1e-3", "products", "gradients", "worst residual"], found)
    lines += ["", f"## Spectral density, {record['probes']} probes x {record['steps']} steps", ""]
    names = list(record["density"])
    methods = list(record["density"][names[0]])
    lines += table(
        ["gradients per probe and step", *names],
        [[method, *(f"{record['density'][name][method]:.2f}" for name in names)] for method in methods],
    )
    lines += ["", "Targets: 1.9 reorthogonalized, 1.6 by the recurrence alone. Others run two probes."]
    return lines


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, help="random starts (default: 3, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="256 digits, one trained network, short densities")
    parser.add_argument("--gpu", action="store_true", help="on CUDA")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    options = parser.parse_args(arguments)
    require_folder(options.out, "krylov")
    device = require_gpu() if options.gpu else "cpu"
    fix_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # of peers
    try:
        if options.quick:
            raise DataNotFoundError
        data = bnp.data.load("mnist", n=2048, flatten=True)
    except DataNotFoundError:
        data = bnp.data.load("digits", n=256 if options.quick else 1500, flatten=True)
    seeds = options.seeds or (1 if options.quick else 3)
    flags = [
        f"--threads {options.threads} --seeds {seeds}",
        *(f"--{word}" for word in ("quick", "gpu") if getattr(options, word)),
    ]
    inputs = data.tensors[0].flatten(1).shape[1]
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/krylov.py", *flags]),
        "about": about(device),
        "data": f"{len(data)} examples of {'digits' if inputs == 64 else 'MNIST'}, network {inputs}-100-100-100-10",
        **{"seeds": seeds, "eigenpairs": {}, "density": {}, "peers": [], "peers_at": ""},
        **{"probes": 2 if options.quick else 10, "steps": 20 if options.quick else 100},
    }
    for epochs in EPOCHS[1:2] if options.quick else EPOCHS:
        network = Network(data, epochs, device)
        name = f"after {epochs} epochs" if epochs else "at its start"
        record["eigenpairs"][name] = list(searches(network, seeds, 110))
        print(f"{name}: eigenpairs done", flush=True)
        if epochs in (EPOCHS[1] if options.quick else EPOCHS[-1],):
            record["density"][name] = densities(network, record["probes"], record["steps"])
            record["peers"], record["peers_at"] = list(peers(network, 10, 1e-3)), name
    lines = page(record)
    write(options.out, "krylov_gpu" if options.gpu else "krylov", lines, record)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
