"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bnp_analysis import data, models, precondition
from bnp_analysis.diagnose import CURVATURES, Comparison, compare, curvature_matrix
from bnp_analysis.errors import BNPAnalysisError, InvalidInputError
from bnp_analysis.linalg import Preconditioner, eigenpairs, spectral_density
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.theory.command import add_check_command
from bnp_analysis.training import fit
from bnp_analysis.training.command import add_train_command

DTYPES = {"float32": torch.float32, "float64": torch.float64}
PRECONDITIONERS: dict[str, Callable[[EmpiricalRisk], Any]] = {
    "bnp": precondition.bnp_preconditioner,
    "bnp-damped": lambda risk: precondition.bnp_preconditioner(risk, eps1=1e-2, eps2=1e-4),
    "diagonal": lambda risk: precondition.diagonal_preconditioner(risk, damping=1e-6),
    "kfac": precondition.kfac_preconditioner,
}
#: Commands that run files of a checkout: name -> (its folder, what it does).
IN_CHECKOUT = {
    "figures": ("paper_figures", "make the figures of the theory"),
    "bench": ("benchmarks", "run a benchmark: truth_suite, bnp_step, peers, ..."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a check fails, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in IN_CHECKOUT:
            return _in_checkout(words[0], words[1:])
        arguments = _parser().parse_args(words)
        return int(arguments.run(arguments))
    except (BNPAnalysisError, ImportError, FileNotFoundError) as error:
        print(f"bnp-analysis: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bnp-analysis: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnp-analysis",
        description="Condition numbers of neural-network losses, with evidence, with and without BNP.",
        epilog="Exit status: 0 done, 1 a check fails, 2 bad input, 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    condition = commands.add_parser(
        "condition",
        help="how well conditioned each layer and the network are, without and with a preconditioner",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _problem_options(condition)
    _figure_option(condition)
    condition.add_argument("--layers", nargs="+", metavar="NAME", help="only these layers in the table")
    condition.add_argument(
        "--curvature", nargs="+", choices=CURVATURES, default=["gauss-newton", "hessian"], help="of the whole network"
    )
    condition.set_defaults(run=_condition)
    spectrum = commands.add_parser(
        "spectrum",
        help="largest eigenvalues and spectral density, without and with a preconditioner",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _problem_options(spectrum)
    _figure_option(spectrum)
    spectrum.add_argument("--curvature", choices=CURVATURES, default="hessian", help="the matrix")
    spectrum.add_argument("--top", type=int, default=5, metavar="K", help="eigenvalues to print")
    spectrum.add_argument("--probes", type=int, default=8, help="random vectors of the density")
    spectrum.add_argument("--steps", type=int, default=64, help="Lanczos steps of each")
    spectrum.set_defaults(run=_spectrum)
    add_train_command(commands)
    add_check_command(commands, _problem_options, _checked)
    for name, (_, words) in IN_CHECKOUT.items():
        commands.add_parser(name, help=f"{words} (in a checkout, found upward from here, or --root FOLDER)")
    return parser


def _in_checkout(command: str, words: list[str]) -> int:
    """Run `python -m paper_figures ...` or `python benchmarks/NAME.py ...` from the root of a checkout."""
    here = Path.cwd()
    if "--root" in words:
        place = words.index("--root")
        here = Path(*words[place + 1 : place + 2])
        del words[place : place + 2]
    folder = IN_CHECKOUT[command][0]
    root = next((path for path in (here, *here.absolute().parents) if (path / folder / "README.md").exists()), None)
    if root is None:
        raise InvalidInputError(
            f"{command} needs a checkout, and {here} is in none: clone the repository (an installed package has no "
            f"{folder}/) and run this inside it, or give --root FOLDER"
        )
    # The checkout's own package, also where another version is installed.
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def run(*program: str) -> int:
        return subprocess.run([sys.executable, *program, *words], cwd=root, env=environment, check=False).returncode

    if command == "figures":
        return run("-m", folder)
    scripts = sorted(
        path.stem for path in (root / folder).glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    )
    if not words or words[0] not in scripts:
        raise InvalidInputError(f"bench needs the name of a benchmark: {', '.join(scripts)}")
    return run(str(root / folder / f"{words.pop(0)}.py"))


def _problem_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", choices=data.names(), default="digits", help="data set; digits is embedded")
    add("--data-dir", metavar="DIR", help="where its files are; default: the variable BNP_ANALYSIS_DATA")
    add("--download", action="store_true", help="fetch missing files (needs the extra 'download')")
    add("--samples", type=int, default=1000, metavar="N", help="training examples used, for training and measuring")
    add("--standardize", action="store_true", help="standardize the inputs instead of raw pixels in [0, 1]")
    add("--model", choices=list(models.MODELS), default="mlp", help="network")
    add("--hidden", type=int, nargs="+", default=[16, 12], metavar="WIDTH", help="hidden widths of the mlp")
    add("--activation", choices=list(models.ACTIVATIONS), default="relu", help="activation")
    add("--norm", choices=list(models.NORMS), default="none", help="normalization layers")
    add("--checkpoint", metavar="FILE", help="state dict to measure at; implies --epochs 0 unless given")
    add("--epochs", type=int, help="epochs of plain SGD before measuring (default: 3, or 0 with a checkpoint)")
    add("--lr", type=float, default=0.05, help="learning rate of that training")
    add("--preconditioner", choices=list(PRECONDITIONERS), default="bnp", help="P")
    add("--dtype", choices=list(DTYPES), default="float64", help="precision of the measurement")
    add("--device", default="cpu", help="device of the measurement")
    add("--seed", type=int, default=0, help="of subset, initialization, training and random starts")
    add("--json", metavar="FILE", help="write the result with its settings")
    add("--quiet", action="store_true", help="no progress bars")


def _figure_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure", metavar="FILE", help="write the figure; the suffix says the format")


def _checked(arguments: argparse.Namespace) -> tuple[EmpiricalRisk, Preconditioner | None]:
    """What `check` is to try: the risk, and the preconditioner unless it is BNP's own."""
    risk, name = _risk(arguments), arguments.preconditioner
    return risk, None if name == "bnp" else PRECONDITIONERS[name](risk)


def _risk(arguments: argparse.Namespace) -> EmpiricalRisk:
    """Data, network, a little training, and the risk at the point reached."""
    flat = arguments.model == "mlp"
    source = {"data_dir": arguments.data_dir, "download": arguments.download, "seed": arguments.seed}
    found = data.load(arguments.data, n=arguments.samples, standardize=arguments.standardize, flatten=flat, **source)
    sizes = {"hidden": arguments.hidden} if flat else {}
    model = models.build_for(
        arguments.model,
        found.input_shape,
        found.num_classes,
        activation=arguments.activation,
        norm=arguments.norm,
        seed=arguments.seed,
        **sizes,
    )
    if arguments.checkpoint:
        _load(model, Path(arguments.checkpoint))
    epochs = arguments.epochs if arguments.epochs is not None else (0 if arguments.checkpoint else 3)
    loss = torch.nn.functional.cross_entropy
    losses = fit(model, loss, found.tensors, epochs=epochs, lr=arguments.lr, seed=arguments.seed)
    model.eval()
    risk = EmpiricalRisk(model, loss, found.tensors, dtype=DTYPES[arguments.dtype], device=arguments.device)
    trained = f"{epochs} epochs, loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "not trained here"
    print(f"{arguments.data}: {len(found)} examples; {arguments.model}, {risk.space.dim} parameters; {trained}")
    return risk


def _load(model: torch.nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("model", state) if isinstance(state, dict) else state)
    except FileNotFoundError as error:
        raise InvalidInputError(f"no checkpoint at {path}") from error
    except Exception as error:
        raise InvalidInputError(
            f"the checkpoint {path} does not fit {type(model).__name__}: {error}. Give the --model and --hidden that "
            "it was saved from; files with arbitrary pickled objects are not read"
        ) from error


def _condition(arguments: argparse.Namespace) -> int:
    risk = _risk(arguments)
    P = PRECONDITIONERS[arguments.preconditioner](risk)
    result = compare(
        risk,
        P,
        curvature=arguments.curvature,
        layers=arguments.layers,
        dtype=None,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    print(report(result))
    if arguments.json:
        result.save(arguments.json)
        print(f"wrote {arguments.json}")
    if arguments.figure:
        from bnp_analysis.plotting import save_comparison

        title = f"{arguments.data}, {arguments.model}: what BNP does to the conditioning"
        save_comparison(result, arguments.figure, title)
        print(f"wrote {arguments.figure}")
    return 0


def _spectrum(arguments: argparse.Namespace) -> int:
    risk = _risk(arguments)
    A = curvature_matrix(risk, arguments.curvature, arguments.seed)
    P = PRECONDITIONERS[arguments.preconditioner](risk)
    progress = not arguments.quiet
    densities = []
    for label, factor in ((arguments.curvature, None), (f"{arguments.curvature} with P", P)):
        pairs = eigenpairs(A, arguments.top, preconditioner=factor, seed=arguments.seed, progress=progress)
        density = spectral_density(
            A,
            preconditioner=factor,
            probes=arguments.probes,
            steps=arguments.steps,
            seed=arguments.seed,
            progress=progress,
        )
        print(f"{label}\n  {pairs}\n  {density}")
        densities.append((label, density))
        if arguments.json:
            base = Path(arguments.json)
            suffix = "" if factor is None else "-with-P"
            for name, result in (("eigenpairs", pairs), ("density", density)):
                path = base.with_name(f"{base.stem}-{name}{suffix}{base.suffix or '.json'}")
                result.save(path)
                print(f"wrote {path}")
    if arguments.figure:
        from bnp_analysis.plotting import save_densities

        save_densities(densities, arguments.figure, f"{arguments.data}, {arguments.model}")
        print(f"wrote {arguments.figure}")
    return 0


def report(result: Comparison) -> str:
    """The text that `condition` prints: table, bounds, methods and product counts."""
    lines = ["", text_table(result.records()), ""]
    lines += [
        "k(.) are sigma_max/sigma_min+ of the layer's inputs, constant features set aside: raw, centred, normalized.",
        "units: the median of the units' blocks (the worst in brackets). >= marks a lower bound.",
    ]
    if all(row.is_hessian for row in result.layers.layers):
        lines.append(
            "Unit and layer blocks of the Gauss-Newton matrix are the Hessian's here: piecewise linear layers."
        )
    else:
        lines.append(
            "Unit and layer blocks are those of the Gauss-Newton matrix; the Hessian's differ where it says no."
        )
    lines += ["", "Layer blocks"]
    for row in result.layers.layers:
        lines += [f"  {row.layer:<8} without P  {row.block}", f"  {'':<8} with P     {row.block_with_P}"]
    lines += ["", "Whole network"]
    for name, (plain, conditioned) in result.network.items():
        lines += [f"  {name}", f"    without P  {plain}", f"    with P     {conditioned}"]
    if result.layers.uncovered:
        lines += ["", "Not covered by P: " + "; ".join(f"{n} ({why})" for n, why in result.layers.uncovered.items())]
    lines += ["", f"{result.matvecs} products with curvature matrices, {result.seconds:.1f} s"]
    return "\n".join(lines)


def text_table(records: Sequence[dict[str, Any]]) -> str:
    """Records as aligned columns."""
    if not records:
        return "(no rows)"
    head = list(records[0])
    body = [[str(record[name]) for name in head] for record in records]
    widths = [max(len(name), *(len(row[i]) for row in body)) for i, name in enumerate(head)]
    return "\n".join("  ".join(entry.rjust(w) for entry, w in zip(row, widths, strict=True)) for row in [head, *body])
