"""Bad inputs by the hundred, made by crossing verbs, arguments and kinds of wrongness, and judged by one rule.

The rule: the answer is an error of the project (on the command line exit status 2 and one line), it names the
argument, and nothing has changed, neither parameters nor random states nor files. Which values are wrong follows from
how an argument is annotated, so that a new verb or argument is tried without a new line here.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import bnp_analysis as bnp
from bnp_analysis.cli import main
from bnp_analysis.errors import BNPAnalysisError

pytestmark = pytest.mark.slow

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(8) % 2
MODEL = bnp.models.mlp([3, 2], dtype=torch.float64)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
RISK = bnp.EmpiricalRisk(MODEL, cross_entropy, (X, Y))
A = bnp.gauss_newton(RISK)
RIGHT: dict[str, Any] = {
    **{"risk": RISK, "over": RISK, "A": A, "model": MODEL, "loss": cross_entropy, "data": (X, Y), "loader": (X, Y)},
    **{"optimizer": OPTIMIZER, "params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.1, "steps": 2, "n": 3},
    **{"fn": lambda v: v, "name": "digits", "widths": [3, 2], "layer": "0", "every": 1, "shapes": {"w": (2,)}},
    **{
        "matrix": torch.eye(3),
        "tol": 1e-2,
        "direction": "gradient",
        "blocks": [torch.arange(4), torch.arange(4, 8)],
        "F": A.factor,
    },
}
NAN, HUGE = math.nan, 10**30
#: A part of an annotation, without `| None` -> values that are wrong wherever it stands.
WRONG: dict[str, list[object]] = {
    "int": ["three", 1.5, NAN, True, [1], torch.ones(2)],
    "float": ["three", NAN, True, [1.0], 1j],
    "str": [3, b"auto", ["auto"], "no such choice"],
    "bool": ["yes", 3, [True]],
    "torch.dtype": ["float64", 3, torch.int64, np.float64],
    "torch.device | str": ["no such device", 3.5],
    "Tensor | Mapping[str, Tensor]": ["theta", torch.zeros(2), {"w": torch.zeros(2)}, 3],
    "Tensor | HasBasis": ["null", torch.zeros(2, 2), torch.full((8, 1), NAN, dtype=torch.float64), 3],
    "Tensor | HasBasis | str": ["null", torch.zeros(2, 2), torch.full((8, 1), NAN, dtype=torch.float64), 3],
    "Preconditioner": [3, "bnp", torch.eye(2), RISK, MODEL],
    "NetworkPreconditioner": [3, "no such", torch.eye(2), RISK, MODEL],
    "SymmetricOperator": [None, 3, RISK, MODEL],
    "LinearOperator": [None, 3, RISK, MODEL],
    "EmpiricalRisk": [None, 3, A, MODEL],
    "nn.Module": [None, 3, RISK, torch.nn.Linear],
    "torch.optim.Optimizer": [None, 3, MODEL, torch.optim.SGD],
    "Block": ["no such layer", ("0", 99), ("0", -1), 3, ("no such layer", 0)],
    "Sequence[str]": [3, ["no such"], [3]],
    "Sequence[int]": [3, ["three"], [0], [1.5]],
    "Sequence[float]": [3, ["three"], [NAN], [-1.0]],
    "str | Path": [3, "", "a-file/run.pt", "a-folder", "a-pipe"],
    "str | os.PathLike[str]": [3, "", "a-file/run.pt", "a-folder", "a-pipe"],
    "Progress": ["yes", 3],
    "Callable[[Any], Tensor]": [3, "logits"],
}
#: The numbers that an argument of this name refuses besides.
RANGES: dict[str, list[object]] = {
    **{key: [0, -1] for key in ["k", "probes", "steps", "points", "samples", "every", "most", "batch_size"]},
    **{key: [0, -1] for key in ["check_every", "checkpoint_every", "max_matvecs"]},
    **{key: [-1] for key in ["epochs", "time_limit"]},
    **{key: [-1, math.inf] for key in ["eps1", "eps2", "damping", "weight_decay"]},
    **{"width": [0.0, -1.0, math.inf], "max_memory": [0, -1], "tol": [0.0, -1.0, 1.0, math.inf]},
    **{"rho": [1.0, -0.1], "failure_probability": [0.0, 1.0, -1.0], "lr": [0.0, -1.0, math.inf], "grow": [-1.0]},
    **{"temperature": [-1.0, math.inf], "reference_rows": [0.0, -1.0], "max_flops": [-1.0], "seed": [HUGE]},
}
VERBS: list[Callable[..., object]] = [
    *(bnp.BNP, bnp.SGLD, bnp.EmpiricalRisk, bnp.SharpnessTracker, bnp.bnp_preconditioner, bnp.check_convergence_rate),
    *(bnp.check_theory, bnp.compare, bnp.condition, bnp.condition_number, bnp.condition_profile, bnp.eigenpairs),
    *(bnp.diagonal_preconditioner, bnp.fisher, bnp.gauss_newton, bnp.hessian, bnp.kfac_preconditioner),
    *(bnp.layer_table, bnp.null_directions, bnp.optimizer_preconditioner, bnp.spectral_density, bnp.trace, bnp.train),
    *(bnp.linalg.lanczos, bnp.CallableOperator, bnp.training.fit, bnp.diagonal, bnp.block_spectra, bnp.slice),
    *(bnp.diagnose.directional_sharpness, bnp.linalg.off_block_share, bnp.linalg.singular_condition_number),
    *(bnp.linalg.on_host, bnp.network.coverage, bnp.network.layer_rows, bnp.training.stability_threshold),
]


def wrong_values(verb: Callable[..., object]) -> Iterator[tuple[str, object]]:
    for name, parameter in inspect.signature(verb).parameters.items():
        kind = str(parameter.annotation)
        optional = kind.endswith(" | None")
        kind = kind.removesuffix(" | None")
        for value in [*WRONG.get(kind, []), *(RANGES.get(name, []) if kind in ("int", "float") else [])]:
            if not (optional and value is None):
                yield name, value


def cases() -> list[Any]:
    return [
        pytest.param(verb, name, value, id=f"{verb.__name__}({name}={type(value).__name__} {k})")
        for verb in VERBS
        for k, (name, value) in enumerate(wrong_values(verb))
    ]


def state() -> tuple[object, ...]:
    """What a refused call leaves as it was."""
    return (
        [p.detach().clone().tolist() for p in MODEL.parameters()],
        [p.grad for p in MODEL.parameters()],
        [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in MODEL.modules()],
        [(p.requires_grad, m.training) for m in MODEL.modules() for p in m.parameters()],
        str(OPTIMIZER.state_dict()),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        random.getstate(),
        sorted((str(path), path.stat().st_mode) for path in Path().rglob("*")),
    )


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what no output may replace; no test gets a path outside of it, since it may run as root."""
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("kept", encoding="utf-8")
    Path("a-folder").mkdir()
    os.mkfifo("a-pipe")


@pytest.mark.parametrize(("verb", "argument", "value"), cases())
def test_a_wrong_argument_is_named_and_changes_nothing(
    verb: Callable[..., object], argument: str, value: object
) -> None:
    parameters = inspect.signature(verb).parameters
    needed = {name: RIGHT[name] for name, p in parameters.items() if p.default is p.empty and name in RIGHT}
    before = state()
    with pytest.raises(BNPAnalysisError) as caught:
        verb(**(needed | {argument: value}))
    assert re.search(rf"\b{argument}\b", str(caught.value)), str(caught.value)
    assert state() == before


COMMANDS = {
    "condition": ["--samples", "20", "--hidden", "3", "--epochs", "0", "--quiet"],
    "spectrum": ["--samples", "20", "--hidden", "3", "--epochs", "0", "--steps", "3", "--probes", "1", "--quiet"],
    "train": ["--samples", "20", "--hidden", "3", "--epochs", "1", "--quiet"],
    "check": ["--samples", "20", "--hidden", "3", "--epochs", "0", "--quiet"],
}
_NUMBER, _PATH = ["three", "nan", "1e400x", ""], ["a-file/run.json", "a-pipe", "a-folder", "."]
OPTIONS: dict[str, list[str]] = {
    **{name: [*_NUMBER, "0", "-3", "1.5"] for name in ("--samples", "--batch-size", "--steps", "--top", "--probes")},
    **{name: [*_NUMBER, "-1"] for name in ("--epochs", "--max-flops", "--weight-decay")},
    "--max-memory": [*_NUMBER, "-1", "0"],
    **{name: [*_NUMBER, "0", "-1", "inf"] for name in ("--lr",)},
    **{name: ["three", "1.5", str(HUGE)] for name in ("--seed",)},
    **{name: ["three", "0", "-3", "1.5"] for name in ("--hidden", "--checkpoint-every", "--probe-every")},
    **{name: ["no such", ""] for name in ("--data", "--model", "--activation", "--norm", "--dtype", "--optimizer")},
    **{name: ["no such", ""] for name in ("--preconditioner", "--engine", "--curvature", "--schedule", "--norm-at")},
    **{name: ["no such", "cuda:99", "meta"] for name in ("--device",)},
    **{name: ["no such"] for name in ("--only", "--layers", "--probe", "--blocks")},
    **{name: [*_NUMBER, "0", "-3", "1.5"] for name in ("--probe-samples",)},
    **{name: [*_NUMBER, "-1", "0"] for name in ("--timeout",)},
    **{name: ["rho", "rho=", "rho=2", "no=1", "q=no", "eps1=-1"] for name in ("--bnp",)},
    **dict.fromkeys(("--json", "--log", "--checkpoint"), _PATH),
    **{name: [*_PATH, "figure.no", "figure"] for name in ("--figure",)},
}


def command_lines() -> Iterator[Any]:
    from bnp_analysis.cli import parser_of

    for command, words in COMMANDS.items():
        known = parser_of(command)._option_string_actions
        for option, values in OPTIONS.items():
            for value in values if option in known else []:
                more = {"--bnp": ["--preconditioner", "bnp"], "--blocks": ["--probes", "2"]}.get(option, [])
                yield pytest.param([command, *words, *more, option, value], option, id=f"{command} {option} {value!r}")


@pytest.mark.parametrize(("words", "option"), list(command_lines()))
def test_a_wrong_command_line_ends_with_status_2_and_one_line(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state()
    try:
        status = main(words)
    except SystemExit as left:  # argparse
        status = left.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert status == 2, said.out + said.err
    name = option.strip("-")
    assert re.search(rf"{name}|{name.replace('-', '_')}", said.err.splitlines()[-1]), said.err
    assert "Traceback" not in said.err
    assert said.out == ""  # nothing was computed before the answer
    assert state() == before


def damages(state: Any, where: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every entry of a state taken out, of another type, with NaN or of another length: a word, and what makes it."""

    def put(value: Any) -> Callable[[], Any]:
        return lambda: value

    if isinstance(state, dict):
        for name, value in state.items():
            here = f"{where}.{name}" if where else str(name)
            yield f"{here} missing", put({n: v for n, v in state.items() if n != name})
            for word, change in damages(value, here):
                yield word, lambda name=name, change=change: state | {name: change()}
    yield f"{where} a word", put("no such")
    if isinstance(state, torch.Tensor) and state.is_floating_point() and state.numel():
        yield f"{where} NaN", put(state * NAN)
        yield f"{where} longer", put(torch.cat([state, state]))


def sampled(state: Any, count: int) -> list[tuple[str, Callable[[], Any]]]:
    """Some of them, the same in every run."""
    found = list(damages(state))
    return random.Random(0).sample(found, min(count, len(found)))


def torn(path: Path) -> Iterator[str]:
    """Put what no run has written in the place of a file, and say what it is."""
    whole = path.read_bytes()
    for word, content in {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "one byte short": whole[:-1],
        "noise": random.Random(0).randbytes(len(whole)),
        "another format": b"PK\x03\x04",
        "a pickle that would run": b"cos\nsystem\n(S'touch ran'\ntR.",
    }.items():
        path.write_bytes(content)
        yield word
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    os.mkfifo(path)
    yield "a pipe"


def refused(call: Callable[[], object], *words: str, given: str = "") -> None:
    """The rule, for files and states: an error of the project with these words, and nothing has changed."""
    before, kept = state(), {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    said = None
    try:
        call()
    except BNPAnalysisError as error:
        said = str(error)
    assert said is not None, f"was taken: {given}"
    assert all(word in said for word in words), said
    assert state() == before
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == kept


SAVED: dict[str, Callable[[Path], object]] = {
    "eigenpairs": lambda path: bnp.eigenpairs(A, 2, checkpoint=path),
    "density": lambda path: bnp.spectral_density(A, probes=2, steps=4, method="quadrature", checkpoint=path),
    "lanczos": lambda path: bnp.linalg.lanczos(A, 5, checkpoint=path),
    "condition number": lambda path: bnp.condition_number(A, method="golub-kahan", checkpoint=path),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_damaged_state_of_a_run_is_named(name: str) -> None:
    path = Path("run.pt")
    SAVED[name](path)
    whole = torch.load(path)
    for word, change in damages(whole["state"]):
        torch.save(whole | {"state": change()}, path)
        refused(lambda: SAVED[name](path), "run.pt", given=word)
    torch.save(whole, path)
    for word in torn(path):
        refused(lambda: SAVED[name](path), "run.pt", given=word)


def training(path: Path) -> object:
    model = bnp.models.mlp([3, 4, 2], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return bnp.train(
        model, cross_entropy, (X, Y), optimizer, preconditioner=bnp.BNP(model), epochs=2, batch_size=4, checkpoint=path
    )


def test_a_damaged_checkpoint_of_a_training_is_named() -> None:
    path = Path("run.pt")
    training(path)
    whole = torch.load(path)
    for word, change in sampled({name: value for name, value in whole.items() if name != "checksums"}, 80):
        torch.save(change() | {"checksums": whole["checksums"]} if isinstance(change(), dict) else change(), path)
        refused(lambda: training(path), "run.pt", given=word)
    torch.save(whole, path)
    for word in torn(path):
        refused(lambda: training(path), "run.pt", given=word)


def test_a_damaged_state_of_bnp_changes_nothing() -> None:
    model = bnp.models.mlp([3, 4, 2], dtype=torch.float64)
    pre = bnp.BNP(model, q="measured", output_scale="estimated")
    for _ in range(2):
        cross_entropy(model(X), Y).backward()
        pre.step()
    whole = pre.state_dict()
    for word, change in damages(whole):
        if word.endswith(("direction missing", "examples missing")):
            continue  # of earlier versions
        refused(lambda change=change: pre.load_state_dict(change()), "state", given=word)
        assert str(pre.state_dict()) == str(whole), word
    first = next(iter(whole["layers"]))
    inside = whole | {"layers": whole["layers"] | {first: whole["layers"][first] | {"unknown": 1}}}
    for extra in (whole | {"unknown": 1}, inside):
        refused(lambda extra=extra: pre.load_state_dict(extra), "unknown", given="an extra entry")


def test_models_without_values_are_refused_before_anything_is_hooked() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, device="meta"))
    refused(lambda: bnp.BNP(model), "1.weight", "meta")
    refused(lambda: bnp.SGLD(model.parameters(), lr=0.1), "params[2]", "meta")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_damaged_result_file_is_named() -> None:
    path = bnp.condition_number(A).save("result.json")
    kept = json.loads(path.read_text())
    for word, change in damages(kept["fields"], "fields"):
        name = word.split(".")[1].split()[0] if "." in word else "fields"
        if word.endswith("missing") or word.count(".") > 1:
            continue  # a default stands in; inside of settings there are any words
        if isinstance(kept["fields"].get(name), str):
            continue
        path.write_text(json.dumps(kept | {"fields": change()}))
        refused(lambda: bnp.Result.load(path), "result.json", name)
    path.write_text(json.dumps(kept))
    for word in torn(path):
        if word != "a pipe":  # whose reader would wait for a writer
            refused(lambda: bnp.Result.load(path), "result.json")


def test_lock_files_that_are_none_are_named() -> None:
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("a-file")):
        lock = Path(".run.pt.lock")
        make(lock)
        refused(lambda: bnp.eigenpairs(A, 2, checkpoint="run.pt"), "run.pt")
        lock.rmdir() if lock.is_dir() else lock.unlink()
    Path(".run.pt.lock").write_bytes(b"\xff no number of a process")
    assert bnp.eigenpairs(A, 2, checkpoint="run.pt").stop == "converged"


VECTOR = torch.zeros(RISK.space.dim, dtype=torch.float64)
TENSORS = {"complex": VECTOR + 0j, "meta": VECTOR.to("meta"), "sparse": VECTOR.to_sparse()}
TAKERS: dict[str, Callable[[torch.Tensor], object]] = {
    "risk": RISK,
    "product": lambda v: A @ v,
    "start": lambda v: bnp.linalg.lanczos(A, 2, start=v),
    "null": lambda v: bnp.condition_number(A, null=v),
    "slice": lambda v: bnp.slice(RISK, v),
    "sharpness": lambda v: bnp.diagnose.directional_sharpness(RISK, v),
    "matrix": lambda v: bnp.linalg.MatrixOperator(v[None] if v.layout is torch.strided else v),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", TAKERS)
def test_tensors_that_are_no_vectors_of_numbers_are_refused(name: str, kind: str) -> None:
    refused(lambda: TAKERS[name](TENSORS[kind]), given=f"{kind} by {name}")


NOTHING = bnp.DenseOperator(torch.zeros(0, 0))
PAIRS = bnp.eigenpairs(A, 2)
EMPTY: dict[str, Callable[[], object]] = {
    "layers": lambda: bnp.layer_table(RISK, layers=[]),
    "blocks": lambda: bnp.diagnose.eigenvector_mass(PAIRS, RISK.space, blocks=[]),
    "block": lambda: bnp.block_spectra(RISK, blocks={"all": None}),  # type: ignore[dict-item]
    "tensors": lambda: RISK.space.flatten([]),
    "points": lambda: bnp.slice(RISK, "gradient", points=10**12),
    "points=": lambda: bnp.spectral_density(A, points=10**12),
    **{f"R^0 {k}": lambda verb=verb: verb(NOTHING) for k, verb in enumerate([bnp.diagonal, bnp.condition_profile])},
    **{f"R^0 {k}": lambda verb=verb: verb(NOTHING, 1) for k, verb in enumerate([bnp.eigenpairs], 2)},
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_and_far_too_much_are_refused(name: str) -> None:
    refused(EMPTY[name], name.split(maxsplit=1)[0], given=name)


def test_ranks_may_come_in_any_order_and_from_anything_that_lists_them() -> None:
    for ranks in ([3, 2], np.array([2, 3]), (r for r in (2, 3))):
        found = bnp.condition_profile(A, ranks=ranks)
        assert found.settings["ranks"] == [2, 3]
