"""Catches: an output that a full or read-only disk leaves torn, that replaces the old file before it is whole, or that
fails in foreign words; memory that is taken before it is asked for."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import bnp_analysis as bnp
from bnp_analysis.cli import main
from bnp_analysis.errors import InvalidInputError, MemoryLimitError, OutputError
from bnp_analysis.runtime import files, memory

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 3, generator=G, dtype=torch.float64), torch.arange(8) % 2
OLD = b"what was there before"


class Disk:
    """A stand-in for the disk under the current folder, since root may write everywhere.

    Attributes:
        free: bytes that fit on it; None for any number.
        error: a number of `errno` with which it refuses to write at all; 0 for none.
        early: whether a trial in a file without a name notices, as where the disk does not change meanwhile.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free: int | None = None
        self.error, self.early = 0, False
        self._open, self._os_open, self._mkdir = io.open, os.open, os.mkdir
        for module, name, stand_in in ((io, "open", self.open), (builtins, "open", self.open)):
            monkeypatch.setattr(module, name, stand_in)
        monkeypatch.setattr(os, "open", self.os_open)
        monkeypatch.setattr(os, "mkdir", self.mkdir)

    def refuse(self, named: bool = True) -> None:
        if self.error and (named or self.early):
            raise OSError(self.error, os.strerror(self.error))

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        named = not isinstance(file, int) and "opener" not in kwargs
        if set(mode) & set("wxa+"):
            self.refuse(named)
        if not set(mode) & set("wxa+") or not named:
            return self._open(file, mode, buffering, *args, **kwargs)
        raw = Writer(file, mode.replace("b", ""), self)
        return raw if buffering == 0 else io.BufferedWriter(raw)

    def os_open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            self.refuse(named=not flags & getattr(os, "O_TMPFILE", 0) and ".lock" in str(path))
        return self._os_open(path, flags, *args, **kwargs)

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        self.refuse()
        self._mkdir(*args, **kwargs)


class Writer(io.FileIO):
    """A file on it, which takes a part of what does not fit, as the system does, and nothing after that."""

    def __init__(self, file: Any, mode: str, disk: Disk) -> None:
        super().__init__(file, mode)
        self.disk = disk

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        if self.disk.free is not None:
            used = sum(path.stat().st_size for path in Path().rglob("*") if path.is_file())
            data = data[: max(0, self.disk.free - used)]
            if not len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.chdir(tmp_path)
    return Disk(monkeypatch)


def operator() -> bnp.linalg.SymmetricOperator:
    return bnp.DenseOperator(torch.diag(torch.arange(1.0, 9, dtype=torch.float64)))


def network() -> torch.nn.Module:
    return bnp.models.mlp([3, 4, 2], dtype=torch.float64)


def training(epochs: int = 2, **outputs: Any) -> list[torch.Tensor]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    bnp.train(
        model, cross_entropy, (X, Y), optimizer,
        preconditioner=bnp.BNP(model), epochs=epochs, batch_size=4, **outputs,
    )  # fmt: skip
    return list(model.parameters())


def figure(path: Path) -> None:
    from bnp_analysis.plotting import save_densities

    density = bnp.spectral_density(operator(), probes=2, steps=4, method="quadrature")
    save_densities([("A", density)], path)


#: Name of a file -> what writes it.
OUTPUTS: dict[str, Callable[[Path], object]] = {
    "result.json": lambda path: bnp.condition_number(operator()).save(path),
    "eigenpairs.pt": lambda path: bnp.eigenpairs(operator(), 2, checkpoint=path),
    "density.pt": lambda path: bnp.spectral_density(
        operator(), probes=2, steps=4, method="quadrature", checkpoint=path
    ),
    "lanczos.pt": lambda path: bnp.linalg.lanczos(operator(), 5, checkpoint=path),
    "bidiagonal.pt": lambda path: bnp.condition_number(
        bnp.gauss_newton(bnp.EmpiricalRisk(network(), cross_entropy, (X, Y))), method="golub-kahan", checkpoint=path
    ),
    "training.pt": lambda path: training(checkpoint=path),
    "figure.png": figure,
}  # fmt: skip
#: Those of them that are read before they are written: a run goes on from its own.
STATES = tuple(name for name in OUTPUTS if name.endswith(".pt"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_that_fills_up_leaves_the_old_file(name: str, disk: Disk) -> None:
    """At the first byte, in the middle, and near the end; what did not fit is taken away again."""
    path = Path(name)
    OUTPUTS[name](path)
    size = path.stat().st_size
    path.unlink()
    kept = {} if name in STATES else {path: OLD}
    for at in (size // 2,) if name == "figure.png" else (0, size // 2, size - 64):
        for old, content in kept.items():
            old.write_bytes(content)
        disk.free = at + sum(map(len, kept.values()))
        with pytest.raises(OutputError, match=rf"^\S*{name} could not be written: No space left on device$"):
            OUTPUTS[name](path)
        assert {found: found.read_bytes() for found in Path().iterdir()} == kept
        disk.free = None
    OUTPUTS[name](path)
    assert OLD not in path.read_bytes()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_that_takes_nothing_is_noticed_before_anything_is_computed(name: str, code: int, disk: Disk) -> None:
    """A result in memory is computed already: where it is saved."""
    disk.error, disk.early = code, True
    argument = "checkpoint" if name in STATES else "path"
    expected = rf"^{argument}='{name}' cannot be written in \S* \({os.strerror(code)}\): nothing was computed$"
    if name == "result.json":
        expected = rf"^\S*{name} could not be written: {os.strerror(code)}$"
    with pytest.raises((InvalidInputError, OutputError), match=expected):
        OUTPUTS[name](Path(name))
    assert not list(Path().iterdir())


def test_a_training_goes_on_when_there_is_room_again(disk: Disk) -> None:
    """From the last checkpoint, with the log cut to what belongs to it: as if nothing had been."""
    wanted = training(4, checkpoint="whole.pt", log="whole.jsonl")
    training(1, checkpoint="run.pt", log="run.jsonl")
    before, used = Path("run.pt").read_bytes(), sum(path.stat().st_size for path in Path().iterdir())
    # The log grows first; with room for it the next checkpoint does not fit beside the old one.
    for name, more in (("run.jsonl", 20), ("run.pt", 1500)):
        disk.free = used + more
        with pytest.raises(OutputError, match=rf"{name} could not be written: No space left on device"):
            training(4, checkpoint="run.pt", log="run.jsonl")
        assert Path("run.pt").read_bytes() == before
        assert {path.name for path in Path().iterdir()} == {"whole.pt", "whole.jsonl", "run.pt", "run.jsonl"}
        disk.free = None
    assert all(map(torch.equal, training(4, checkpoint="run.pt", log="run.jsonl"), wanted))
    lengths = [len(Path(name).read_text().splitlines()) for name in ("run.jsonl", "whole.jsonl")]
    assert lengths[0] == lengths[1]


@pytest.mark.slow
def test_figures_leave_whole_files_on_a_disk_that_fills_up(disk: Disk) -> None:
    """Data and pictures of the program that draws the paper's figures: each the old one or the new one."""
    from paper_figures import __main__ as runner
    from paper_figures import frame

    name, folder = "fig10_shift_and_scale", Path("figures")
    data = frame.stored(name, frame.HERE / "full")
    assert data is not None
    folder.mkdir()
    for form, write in (
        ("png", lambda: runner.draw(name, data, folder)),
        ("npz", lambda: frame.save(data, folder / name)),
    ):
        old = folder / f"{name}.{form}"
        old.write_bytes(OLD)
        disk.free = sum(path.stat().st_size for path in folder.iterdir()) + 500
        with pytest.raises(OutputError, match=rf"^\S*{name}\.{form} could not be written: No space left on device$"):
            write()
        assert old.read_bytes() == OLD
        assert {path.suffix for path in folder.iterdir()} == {".png", ".npz"} - ({".npz"} if form == "png" else set())
        disk.free = None
        write()
        assert OLD not in old.read_bytes()
        for path in folder.glob("*.pdf"):
            path.unlink()


SMALL = ["--samples", "20", "--hidden", "3", "--quiet"]
#: Words of a command, and its outputs.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "condition": (["--epochs", "0", "--curvature", "gauss_newton"], ["--json out.json", "--figure out.png"]),
    "spectrum": (
        ["--epochs", "0", "--top", "1", "--steps", "3", "--probes", "1"],
        ["--json out.json", "--figure out.png"],
    ),
    "train": (["--epochs", "1"], ["--checkpoint out.pt", "--log out.jsonl", "--json out.json"]),
    "check": (["--epochs", "0", "--only", "T1"], ["--json out.json"]),
}
LINES = [
    pytest.param(
        command, output, full,
        id=f"{command} {output}, {'full at byte 100' if full else 'read-only'}",
        marks=[pytest.mark.slow] if full and command in ("condition", "check") else [],
    )
    for command, (_, outputs) in COMMANDS.items()
    for output in outputs
    for full in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("command", "output", "full"), LINES)
def test_commands_say_one_sentence_and_leave_old_files(
    command: str, output: str, full: bool, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    option, file = output.split()
    written = Path("out-eigenpairs.json" if output == "--json out.json" and command == "spectrum" else file)
    if option != "--checkpoint":
        written.write_bytes(OLD)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    if full:
        disk.free = 100 + len(OLD)
    else:
        disk.error, disk.early = errno.EROFS, True
    assert main([command, *SMALL, *COMMANDS[command][0], option, file]) == 2
    said = capsys.readouterr()
    (sentence,) = said.err.splitlines()
    if full:
        assert re.fullmatch(
            rf"bnp-analysis: error: \S*{written} could not be written: No space left on device", sentence
        )
    else:
        reason = r"\(Read-only file system\): nothing was computed"
        assert re.fullmatch(rf"bnp-analysis: error: {option}='{file}' cannot be written in \S* {reason}", sentence)
        assert said.out == ""
    after = {path: path.read_bytes() for path in Path().iterdir()}
    if full and option == "--log":  # that of an earlier run is begun anew, line by line
        assert after.pop(written).startswith(b'{"kind"')
        del before[written]
    assert after == before


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        ("spectrum --json out.json", "out-eigenpairs.json"),
        ("spectrum --json out.json", "out-density.json"),
        ("spectrum --json out.json", "out-eigenpairs-with-P.json"),
        ("spectrum --json out", "out-density-with-P.json"),
        ("spectrum --blocks --probes 2 --json out.json", "out.json"),
        ("condition --json out.json --figure taken.png", "taken.png"),
        ("train --json out.json --log out.jsonl --checkpoint taken.pt", "taken.pt"),
    ],
)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_every_output_of_a_command_is_tried_before_anything_is_computed(
    words: str, taken: str, make: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make(taken)
    assert main([*words.split(), *SMALL]) == 2
    said = capsys.readouterr()
    option = next(word for word in words.split() if word in ("--json", "--figure", "--checkpoint"))
    option = option if taken.startswith("out") else words.split()[-2]
    kind = "a folder" if make is os.mkdir else "no ordinary file, which writing would replace"
    assert said.err == f"bnp-analysis: error: {option}='{taken}' is {kind}; give the path of a file\n"
    assert said.out == ""
    assert [path.name for path in Path().iterdir()] == [taken]


@pytest.mark.parametrize(
    ("words", "first", "second", "name"),
    [
        ("condition --json out.png --figure ./out.png", "--json", "--figure", "out.png"),
        ("spectrum --json out --figure out-density.svg --json out.svg", "--json", "--figure", "out-density.svg"),
        ("train --log out --checkpoint out", "--log", "--checkpoint", "out"),
        ("check --checkpoint net.pt --json net.pt", "--checkpoint", "--json", "net.pt"),
        ("check --checkpoint link.pt --json net.pt", "--checkpoint", "--json", "net.pt"),
    ],
)
def test_two_outputs_are_two_files(
    words: str, first: str, second: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nor is a file that is read one that is written, by whichever of its names."""
    monkeypatch.chdir(tmp_path)
    Path("net.pt").write_bytes(OLD)
    Path("link.pt").symlink_to("net.pt")
    assert main([*words.split(), *SMALL]) == 2
    said = f"{first} and {second} name the same file '{name}': one would replace the other"
    assert capsys.readouterr() == ("", f"bnp-analysis: error: {said}\n")
    assert Path("net.pt").read_bytes() == OLD


def test_the_checkpoint_of_a_training_is_not_its_log(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(
        InvalidInputError, match=r"^log and checkpoint name the same file 'run': one would replace the other$"
    ):
        training(checkpoint=path, log=path)
    assert not path.exists()


# memory


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """The bytes of the largest storage that an operation has made."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.found = max(self.found, t.untyped_storage().nbytes())
        return out


def wide() -> bnp.EmpiricalRisk:
    """600 inputs of 8 units: the data have .4 MB, what multiplies all weights by themselves 180 MB."""
    x = torch.randn(80, 600, generator=G, dtype=torch.float64)
    return bnp.EmpiricalRisk(bnp.models.mlp([600, 8, 2], dtype=torch.float64), cross_entropy, (x, torch.arange(80) % 2))


#: What takes more than its input does.
TAKES: dict[str, Callable[[bnp.EmpiricalRisk], object]] = {
    **{
        method: lambda risk, method=method: bnp.condition_number(bnp.gauss_newton(risk), method=method)
        for method in ("dense", "factor-svd", "golub-kahan")
    },
    "lanczos": lambda risk: bnp.condition_number(bnp.gauss_newton(risk), method="lanczos", steps=100),
    "process": lambda risk: bnp.linalg.lanczos(bnp.gauss_newton(risk), 200),
    "eigenpairs": lambda risk: bnp.eigenpairs(bnp.gauss_newton(risk), 40),
    "density": lambda risk: bnp.spectral_density(bnp.gauss_newton(risk), method="dense"),
    "K-FAC": bnp.kfac_preconditioner,
    "null directions": bnp.null_directions,
    "report": lambda risk: bnp.diagnose.preconditioner_report(bnp.bnp_preconditioner(risk)),
    "condition": bnp.condition,
    "table": bnp.layer_table,
    "compare": bnp.compare,
}


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A process in a control group whose limit leaves it a megabyte."""
    group, own = tmp_path / "groups" / "a", tmp_path / "own"
    group.mkdir(parents=True)
    own.write_text("0::/a\n")
    for name, text in (("max", f"{2**30}\n"), ("current", f"{2**30 - 2**20}\n"), ("stat", "inactive_file 0\n")):
        (group / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_within_control_groups", partial(memory._within_control_groups, group.parent, own))
    return 2**20


def test_a_network_is_refused_before_it_is_built(container: int, capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in (
        (["condition", "--hidden", "10000", "--samples", "20", "--epochs", "0"], "a network of 7.4e+05 weights"),
        (["train", "--hidden", "1" + "0" * 30, "--samples", "20"], "a network of 7.4e+31 weights"),
    ):
        with Largest() as largest:
            assert main([*words, "--quiet"]) == 2
        said = capsys.readouterr()
        assert what in said.err
        assert largest.found <= container
        assert said.out == ""


@pytest.mark.parametrize("name", ["a\0b", "n" * 230, "n" * 300, "loop", "\ud800"])
def test_a_path_that_no_disk_has_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte that ends words, a name too long, also for the file beside it; a link to itself; half a character."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for call, argument in (
        (lambda: bnp.eigenpairs(operator(), 2, checkpoint=name), f"checkpoint={name!r}"),
        (lambda: bnp.condition_number(operator()).save(name), f"the path {name!r}"),
    ):
        with pytest.raises(
            InvalidInputError, match=rf"^{re.escape(argument)} is no path of a file \(.*\); give another$"
        ):
            call()
    assert main(["condition", "--json", name]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"bnp-analysis: error: --json={name!r} is no path of a file")
    assert [path.name for path in Path().iterdir()] == ["loop"]


def test_a_training_that_would_change_nothing_is_refused() -> None:
    model, other = network(), network()
    with pytest.raises(InvalidInputError, match=r"^the optimizer holds no parameter of the model, which would stay as"):
        bnp.train(model, cross_entropy, (X, Y), torch.optim.SGD(other.parameters(), lr=0.1), epochs=1)


def test_inputs_without_values_and_losses_without_an_order_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^batch 0 is on the meta device: it has a shape and no values$"):
        bnp.EmpiricalRisk(network(), cross_entropy, (X.to("meta"), Y))
    said = r"^loss\(output, y\) gave a complex number, which has no smallest value: write what is minimized"
    with pytest.raises(InvalidInputError, match=said):
        bnp.EmpiricalRisk(network(), lambda output, y: cross_entropy(output, y) + 0j, (X, Y))


@pytest.mark.parametrize("name", TAKES)
def test_memory_is_refused_before_it_is_taken(name: str, container: int) -> None:
    risk = wide()
    with Largest() as largest, pytest.raises(MemoryLimitError, match=r" would take about \S+ GiB, 0\.000977 GiB are "):
        TAKES[name](risk)
    assert 0 < largest.found <= container or name in ("process", "density")  # which make no tensor at all


def test_lanczos_takes_the_steps_that_memory_has_room_for(container: int) -> None:
    risk = wide()
    with Largest() as largest:
        found = bnp.condition_number(bnp.gauss_newton(risk), method="lanczos")
    assert 0 < largest.found <= container
    assert re.search(r"memory has room for \d+ of 100 steps", found.note)


@pytest.mark.parametrize("command", ["condition", "spectrum"])
def test_commands_refuse_memory_in_a_sentence(
    command: str, container: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--samples", "200", "--hidden", "60", "--epochs", "0", "--quiet", "--json", str(tmp_path / "out.json")]
    assert main([command, *words]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.match(r"bnp-analysis: error: .* would take about \S+ GiB, 0\.000977 GiB are available", sentence)
    assert not (tmp_path / "out.json").exists()


# files of a run


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_result_replaces_no_folder_and_no_pipe(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "taken"
    make(path)
    with pytest.raises(InvalidInputError, match=r"taken is a folder, a pipe or a device, which writing would replace$"):
        bnp.condition_number(operator()).save(path)
    assert [left.name for left in tmp_path.iterdir()] == ["taken"]


def test_an_error_that_is_not_the_systems_stays_what_it_is() -> None:
    error = RuntimeError("no matter of files")
    with pytest.raises(RuntimeError) as seen, files.writing("run.pt"):
        raise error
    assert seen.value is error


def test_what_a_killed_run_left_is_taken_away_by_the_next(tmp_path: Path) -> None:
    for name in (".run[1].pt.0a.tmp", ".run1.pt.0a.tmp", ".run[1].pt.tmp.pt"):
        (tmp_path / name).write_bytes(OLD)
    with files.sole_writer(tmp_path / "run[1].pt"):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {".run[1].pt.lock", ".run1.pt.0a.tmp", ".run[1].pt.tmp.pt"}


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_lock_that_is_no_file_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / ".run.pt.lock")
    said = r"checkpoint=\S*run\.pt is locked by \S*\.run\.pt\.lock, which is no ordinary file: delete it$"
    with pytest.raises(InvalidInputError, match=said):
        bnp.eigenpairs(operator(), 2, checkpoint=tmp_path / "run.pt")


def test_where_no_locks_are_known_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert bnp.eigenpairs(operator(), 2, checkpoint=tmp_path / "run.pt").stop == "converged"
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_path_that_is_only_read_may_be_any(tmp_path: Path) -> None:
    """A process beside the one that writes asks for nothing, and makes nothing."""
    (tmp_path / "file").write_bytes(OLD)
    for path in (tmp_path, tmp_path / "file" / "run.pt", tmp_path / "none" / "run.pt"):
        files.require_output(files.ReadOnlyPath(path), "checkpoint")
        with files.sole_writer(files.ReadOnlyPath(path)):
            assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_no_state(tmp_path: Path) -> None:
    said = (
        r"is not a saved run, or damaged \(it is a folder, a pipe or a device\); delete it, or give another checkpoint="
    )
    with pytest.raises(InvalidInputError, match=said):
        files.read_state(tmp_path, "a saved run")


def test_limits_of_memory_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert memory._within_control_groups(tmp_path, tmp_path / "none") == sys.maxsize
    (tmp_path / "own").write_text("0::/a\n")
    (tmp_path / "a").mkdir()
    above = {"max": "1000", "current": "400", "stat": "inactive_file 100"}
    for limit in ("no number", "500"):  # of the latter there is nothing that says how much is used
        (tmp_path / "a" / "memory.max").write_text(limit)
        for name, text in above.items():
            (tmp_path / f"memory.{name}").write_text(text)
        assert memory._within_control_groups(tmp_path, tmp_path / "own") == 700


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux has it")
def test_the_peak_of_memory_is_that_of_this_process_in_megabytes() -> None:
    def now(name: str) -> float:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) / 1024

    before = memory.peak_memory("cpu")
    assert now("VmRSS") <= before <= now("VmHWM")
    assert memory.peak_memory("cpu", reset=True) <= before
