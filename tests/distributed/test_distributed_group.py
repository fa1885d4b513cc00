"""What a group is without other processes, and how data are cut.

Bugs that only these tests catch: shards that lose or repeat an example, that are not in the order of the data, or cut
only the first of several tensors; draws of an example that depend on what else is drawn, or are not uniform; moments
that are not those of all rows once pieces of any sizes are merged; commands that do all of their work in each process;
several processes that measure alone because torch cannot connect them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_jobs import ROOT
from hypothesis import given
from hypothesis import strategies as st

import bnp_analysis as bnp
from bnp_analysis.cli import main
from bnp_analysis.distributed import ALONE, Group
from bnp_analysis.errors import DistributedError, InvalidInputError
from bnp_analysis.network.moments import Accumulator
from bnp_analysis.runtime.files import ReadOnlyPath, saved_run
from bnp_analysis.runtime.random import uniform_at


def of(rank: int, size: int) -> Group:
    group = Group()
    group.rank, group.size = rank, size
    return group


@given(st.integers(0, 40), st.integers(1, 7))
def test_parts_are_the_whole_in_order_and_nearly_even(count: int, size: int) -> None:
    parts = [of(rank, size).part(count) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(0, 12), st.integers(1, 4))
def test_every_tensor_of_every_form_of_data_is_cut(count: int, size: int) -> None:
    a, b = torch.arange(count), torch.rand(count, 2)
    shards = [of(rank, size).shard(({"a": a, "pair": (a, b)}, b)) for rank in range(size)]
    shards = [shard for shard in shards if shard]
    for leaf, whole in (
        (lambda s: s[0]["a"], a),
        (lambda s: s[0]["pair"][0], a),
        (lambda s: s[0]["pair"][1], b),
        (lambda s: s[1], b),
    ):
        assert torch.equal(torch.cat([leaf(s) for s in shards] or [whole[:0]]), whole)
    batches = [of(rank, size).shard(list(range(count))) for rank in range(size)]
    assert [i for part in batches for i in part] == list(range(count))
    dataset = torch.utils.data.TensorDataset(a)
    assert [int(x) for rank in range(size) for (x,) in of(rank, size).shard(dataset)] == list(range(count))


def test_data_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"tensors of .* rows"):
        ALONE.shard((torch.ones(3), torch.ones(2)))
    with pytest.raises(InvalidInputError, match="make the loader from"):
        ALONE.shard(torch.utils.data.DataLoader([1, 2]))

    class Stream(torch.utils.data.IterableDataset[int]):
        """Examples without a number."""

        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

    with pytest.raises(InvalidInputError, match="make the loader from"):
        ALONE.shard(Stream())


def test_alone_everything_is_its_own_sum(tmp_path: Path) -> None:
    t = torch.ones(3)
    assert ALONE.sum(lambda: t, "t") is t
    assert ALONE.gather(lambda: t, "t") is t
    assert ALONE.share(lambda: "word", "a word") == ["word"]
    assert ALONE.from_first(t, "t") is t
    assert ALONE.checkpoint(tmp_path / "state.pt") == tmp_path / "state.pt"
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError


def test_a_process_that_only_reads_writes_no_state(tmp_path: Path) -> None:
    with saved_run(ReadOnlyPath(tmp_path / "state.pt"), "key") as saved:
        saved.save({})
    assert list(tmp_path.iterdir()) == []


@given(st.integers(-5, 5), st.permutations(range(6)))
def test_draws_belong_to_their_example(seed: int, order: list[int]) -> None:
    every = uniform_at(seed, torch.arange(6).unsqueeze(1), torch.arange(4))
    some = uniform_at(seed, torch.tensor(order).unsqueeze(1), torch.arange(4))
    assert torch.equal(some, every[order])
    assert 0 < float(every.min()) < float(every.max()) < 1
    assert not torch.equal(every, uniform_at(seed + 1, torch.arange(6).unsqueeze(1), torch.arange(4)))


def test_draws_are_uniform_and_uncorrelated() -> None:
    u = uniform_at(0, torch.arange(4000).unsqueeze(1), torch.arange(5))
    counts = torch.histc(u, 10, 0, 1) / u.numel()
    assert float((counts - 0.1).abs().max()) < 4 * (0.09 / u.numel()) ** 0.5
    across = torch.corrcoef(torch.cat([u.T, u.T.roll(1, dims=1)])) - torch.eye(10)
    assert float(across.abs().max()) < 5 / 4000**0.5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum), st.sampled_from([1.0, 1e8]))
def test_merged_moments_are_those_of_all_rows(sizes: list[int], offset: float) -> None:
    rows = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    rows[:, 2] = offset
    merged = Accumulator()
    for part in rows.split(sizes):
        piece = Accumulator()
        if len(part):
            piece.add(part)
        merged.merge(piece)
    assert merged.count == len(rows)
    assert torch.allclose(merged.mean, rows.mean(dim=0), rtol=1e-14)
    assert torch.allclose(
        merged.variance, rows.var(dim=0, correction=0), rtol=1e-7 if offset > 1 else 1e-12, atol=1e-15
    )
    assert bool(merged.constant[2])


def test_without_connections_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert bnp.distributed.initialize() is ALONE
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match="built without"):
        bnp.distributed.initialize()
    with pytest.raises(InvalidInputError, match="timeout"):
        bnp.distributed.initialize(timeout=0)


@pytest.mark.parametrize("words", [["check"], ["train"], ["figures"], ["bench", "peers"]])
def test_commands_for_one_process_say_so(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(words) == 2
    assert f"{words[0]} does not share its work" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_of_two_processes_runs(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "scaling.json").read_text())
    for network in record["networks"].values():
        assert min(network[name][key] for name in ("Hessian", "Gauss-Newton") for key in ("one", "two", "busy")) > 0
    assert "64 ranks" in (tmp_path / "scaling.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["condition", "spectrum --probes 2 --steps 12"])
def test_torchrun_prints_what_one_process_prints(command: str, tmp_path: Path) -> None:
    words = [*command.split(), "--samples", "61", "--hidden", "4", "--quiet", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    said = []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        line = [sys.executable, *launcher, "-m", "bnp_analysis", *words, str(tmp_path / name / "found.json")]
        run = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        # Gaps are ratios to rounding errors, residuals are such errors. One process cuts the factors of layers from
        # that of the network, several form them: what that costs differs.
        own = r", gap [^ ,;]*| \+- [0-9.]+e-[1-9]\d|^[0-9]+ products with curvature matrices|, [0-9.]+ s$|wrote .*"
        said.append(re.sub(own, "", run.stdout, flags=re.M).strip())
    assert said[0] == said[1]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())
