"""Curvature operators from graphs of the batches, which are kept for all products or rebuilt in each.

A curvature is an `EngineOperator`: it says how the graph of one batch is recorded and multiplied with. Its engine hands
it the graph of every batch in turn. *Retained* graphs cost memory once and time never; *recompute* holds one graph at a
time, used for all columns of a block and then dropped; *auto* keeps what fits. What a graph takes is measured on a few
examples before the first whole one is recorded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bnp_analysis.curvature.products import saved_tensors
from bnp_analysis.distributed import over_processes
from bnp_analysis.errors import InvalidInputError, MemoryLimitError
from bnp_analysis.linalg.derived import Restriction
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.observation import transformed
from bnp_analysis.network.parameters import Block, ParameterSpace
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.memory import available_memory
from bnp_analysis.runtime.threads import LOCK
from bnp_analysis.runtime.trees import tensors_of

G = TypeVar("G")
ENGINES = ("auto", "retained", "recompute")

# Without max_memory, kept graphs may take this share of the memory that is free when the first product is asked for.
_SHARE = 0.4
# What a product takes beside the graphs, as a share of one graph: measured by benchmarks/engines.py.
_WORKING = 0.75
# Examples of the two small batches from which the size of a graph is extrapolated.
_FEW = (4, 8)


@dataclass(frozen=True)
class Plan:
    """How an operator's products are computed, and what memory they take.

    Attributes:
        engine: `"retained"` (every graph is kept), `"recompute"` (none), `"mixed"`.
        kept: batches whose graph is kept.
        batches: of the data.
        graph_bytes: estimate for the largest batch.
        bytes: estimate of what the operator keeps and one product needs.
        limit: bytes it was allowed.
    """

    engine: str
    kept: int
    batches: int
    graph_bytes: int
    bytes: int
    limit: int

    def __str__(self) -> str:
        return f"{self.engine}, graphs of {self.kept} of {self.batches} batches kept, about {_size(self.bytes)}"


class Engine(Generic[G]):
    """The graphs of a risk's batches, by one of `ENGINES`.

    Args:
        risk: the empirical risk.
        build: records the graph of one batch.
        name: of the engine.
        max_memory: bytes that kept graphs and one product may take together.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        build: Callable[[EmpiricalRisk, Batch], G],
        name: str = "auto",
        max_memory: int | None = None,
    ) -> None:
        if name not in ENGINES:
            raise InvalidInputError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
        if max_memory is not None and max_memory <= 0:
            raise InvalidInputError(f"max_memory is a positive number of bytes, got {max_memory}")
        if name == "retained" and not risk.batches.ordered:
            raise InvalidInputError(
                "a loader that may change its order has no graphs to retain: its batches are other ones in every "
                "pass. Use engine='recompute', or give list(loader)"
            )
        self.name, self.max_memory = name, max_memory
        self._risk, self._build = risk, build
        self._kept: list[G] = []
        self._plan: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Graphs belong to this process: a copy records its own.
        return vars(self) | {"_kept": []}

    @property
    def plan(self) -> Plan:
        """The plan, made before the first product.

        Raises:
            MemoryLimitError: not even one batch fits, or `"retained"` was asked for and not all do.
        """
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    @property
    def record(self) -> dict[str, Any]:
        """What results keep: what was asked for, what lowers the precision and, once there was a product, the plan."""
        asked = {"asked": self.name, "max_memory": self.max_memory} | self._risk.provenance
        return asked if self._plan is None else asked | asdict(self._plan)

    @full_float32
    def each(self, use: Callable[[G, int, bool], None]) -> None:
        """`use(graph, b, kept)` for every batch `b`; a graph that is not kept lives no longer than its use."""
        with LOCK:  # one thread differentiates a graph, and decides which are kept
            plan = self.plan
            if len(self._kept) == plan.batches:
                for b, graph in enumerate(self._kept):
                    use(graph, b, True)
                return
            for b, batch in enumerate(self._risk.batches):
                if b == len(self._kept) < plan.kept:
                    self._kept.append(self._build(self._risk, batch))
                if b < len(self._kept):
                    use(self._kept[b], b, True)
                else:
                    use(self._build(self._risk, batch), b, False)

    def total(self, columns: int, use: Callable[[G, int, int, bool], list[Tensor]]) -> Tensor:
        """`(n, columns)`, the sum over the batches `b` of `use(graph, b, column, retain)`, flattened.

        Several batches are summed in float64: their number then adds no rounding.
        """
        space = self._risk.space
        wide = torch.float64 if self.plan.batches > 1 else space.dtype
        sums = torch.zeros(columns, space.dim, dtype=wide, device=space.device)

        def add(graph: G, b: int, kept: bool) -> None:
            for k in range(columns):
                sums[k] += space.flatten(use(graph, b, k, kept or k + 1 < columns))

        self.each(add)
        return sums.to(space.dtype).T

    def matmat(self, x: Tensor, product: Callable[[G, int, list[Tensor], bool], list[Tensor]]) -> Tensor:
        """The sum over the batches of `product(graph, b, column, retain)` for each column of `x (n, k)`, flattened."""
        vectors = tensors_of_columns(self._risk.space, x)
        return self.total(x.shape[1], lambda graph, b, k, retain: product(graph, b, vectors[k], retain))

    def _make_plan(self) -> Plan:
        free = available_memory(self._risk.space.device)
        limit = free if self.max_memory is None else self.max_memory
        if self._risk.batches.number == 0:  # A process whose shard is empty.
            return Plan("retained", 0, 0, 0, 0, limit)
        sizes = _Sizes(self._risk, self._build, limit)
        largest = sizes.bytes_of(max(sizes.examples))
        working = int(_WORKING * largest)
        if sizes.exceeded or largest + working > limit:
            raise MemoryLimitError(self._refusal(sizes, limit))
        graphs = [sizes.bytes_of(n) for n in sizes.examples]
        budget = limit if self.max_memory is not None or self.name == "retained" else int(_SHARE * free)
        kept = 0
        if self.name != "recompute" and self._risk.batches.ordered:
            # Beside the kept graphs there is room for the largest of those that are rebuilt.
            held, largest_left = [0, *accumulate(graphs)], [0, *accumulate(reversed(graphs), max)][::-1]
            needs = [a + b for a, b in zip(held, largest_left, strict=True)]
            kept = max((k for k, need in enumerate(needs) if need <= budget - working), default=0)
        if self.name == "retained" and kept < len(graphs):
            raise MemoryLimitError(
                f"the graphs of all {len(graphs)} batches take about {_size(sum(graphs) + working)}, {_size(limit)} "
                f"are allowed, so keeping them would exhaust the memory. Use engine='auto', which keeps {kept} of them "
                "and rebuilds the others in every product, or raise max_memory"
            )
        engine = "retained" if kept == len(graphs) else "mixed" if kept else "recompute"
        need = sum(graphs[:kept]) + max(graphs[kept:], default=0) + working
        return Plan(engine, kept, len(graphs), largest, need, limit)

    def _refusal(self, sizes: _Sizes, limit: int) -> str:
        fits = sizes.fitting(int(limit / (1 + _WORKING)))
        need = _size((1 + _WORKING) * sizes.bytes_of(max(sizes.examples)))
        return (
            f"a product over one batch of {max(sizes.examples)} examples needs "
            f"{'more than' if sizes.exceeded else 'about'} {need}, {_size(limit)} are allowed, so it would exhaust "
            f"the memory. {f'Batches of at most {fits} examples' if fits else 'Not even one example'} would fit; "
            "give smaller ones, differentiate fewer parameters (block=, params=), or raise max_memory"
        )


class _Sizes:
    """The bytes of the batches' graphs: those of the tensors saved in them, linear in the number of examples.

    Where examples are independent, extrapolated from two small batches; else counted while the largest is recorded,
    which stops at the limit.
    """

    def __init__(self, risk: EmpiricalRisk, build: Callable[[EmpiricalRisk, Batch], object], limit: int) -> None:
        self.examples: list[int] = []
        largest: Batch | None = None
        for batch in risk.batches:
            self.examples.append(tensors_of(batch.x)[0].shape[0])
            if largest is None or self.examples[-1] == max(self.examples) > tensors_of(largest.x)[0].shape[0]:
                largest = batch
        assert largest is not None
        self.exceeded = False
        few = [part for n in _FEW if (part := slice_batch(largest, 0, n)) is not None]
        if few and not risk.coupled and max(self.examples) > sum(_FEW):
            # A model made for one size of batch fails on others.
            with suppress(RuntimeError, ValueError):
                low, high = (_saved_bytes(risk, build, part) for part in few)
                self._slope = (high - low) / (_FEW[1] - _FEW[0])
                self._fixed = low - _FEW[0] * self._slope
                return
        try:
            whole = _saved_bytes(risk, build, largest, limit)
        except _Exceeded:
            self.exceeded, whole = True, limit
        self._slope, self._fixed = whole / max(self.examples), 0.0

    def bytes_of(self, examples: int) -> int:
        """Of the graph of a batch of so many examples."""
        return max(1, int(self._fixed + self._slope * examples))

    def fitting(self, limit: int) -> int:
        """Examples of a batch whose graph has at most so many bytes."""
        return max(0, int((limit - self._fixed) / self._slope)) if self._slope > 0 else 0


class _Exceeded(MemoryError):
    """Counting stopped at the limit."""


def _saved_bytes(
    risk: EmpiricalRisk,
    build: Callable[[EmpiricalRisk, Batch], object],
    batch: Batch,
    limit: float = float("inf"),
) -> int:
    # The data of a batch, of which a small one is a view: they are held by the graph only where nothing else does.
    data = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors_of((batch.x, batch.y))}
    saved: dict[StorageWeakRef, int] = {}
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        # Nothing of their own: the tensor inside is counted; zeros by rule; a sparse matrix of the model.
        if transformed(t) or t._is_zerotensor() or t.layout != torch.strided:
            return t.detach()
        storage = t.untyped_storage()
        given = storage.data_ptr() in data
        ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if ref not in saved and not (given and risk.batches.in_memory):
            saved[ref] = data[storage.data_ptr()] if given else storage.nbytes()
            total += saved[ref]
        if total > limit:
            raise _Exceeded
        return t.detach()  # an output that its own node holds would keep the graph alive for ever

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            graph = build(risk, batch)
    except InvalidInputError as error:
        if "saved tensor hooks" not in str(error):
            raise
        # The transforms of torch.func refuse to be watched while they record.
        graph = build(risk, batch)
        for t in saved_tensors(graph):
            pack(t)
    for part in graph if isinstance(graph, tuple) else (graph,):
        for t in getattr(part, "held", ()):
            pack(t)
    # Without what recording needed and the graph does not hold.
    alive = [size for ref, size in saved.items() if not ref.expired()]  # type: ignore[no-untyped-call]
    return sum(alive)


def tensors_of_columns(space: ParameterSpace, x: Tensor) -> list[list[Tensor]]:
    """The columns of a block `(n, k)`, each as tensors of the space."""
    return [list(space.unflatten(column).values()) for column in x.T.contiguous().unbind()]


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


class EngineOperator(SymmetricOperator, Generic[G]):
    """A curvature matrix of a risk: a sum over its batches of products with their recorded graphs.

    A new curvature gives `product`, and what it knows of its precision; the file that has it adds it to `CURVATURES`.

    Args:
        risk: the empirical risk.
        engine: holds the graphs.
    """

    def __init__(self, risk: EmpiricalRisk, engine: Engine[G]) -> None:
        super().__init__(risk.space.dim, risk.space.dtype, risk.space.device, risk.eps)
        self._risk, self.group, self._engine = risk, risk.group, engine

    @abstractmethod
    def product(self, graph: G, batch: int, v: list[Tensor], retain: bool) -> list[Tensor]:
        """What one batch, the `batch`-th of this process, adds to the product with `v`, per tensor."""

    @property
    def engine(self) -> Plan:
        """How products are computed, and their estimated memory."""
        return self._engine.plan

    @property
    def record(self) -> Mapping[str, Any]:
        return self._engine.record

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._risk.space.shapes

    @property
    def start(self) -> Tensor:
        """The risk's gradient."""
        return self._risk.gradient

    @over_processes
    def _matmat(self, x: Tensor) -> Tensor:
        return self._own_matmat(x)

    def _own_matmat(self, x: Tensor) -> Tensor:
        """The product with this process's part."""
        return self._engine.matmat(x, self.product)


#: Name -> what makes the matrix from a risk and `seed=`, `engine=`, `max_memory=`; the file of each adds it.
CURVATURES: dict[str, Callable[..., SymmetricOperator]] = {}


def curvature_names(*given: str) -> list[str]:
    """The names in `CURVATURES` of curvatures; hyphens, as on a command line, count as underscores.

    Raises:
        InvalidInputError: there is no curvature of one of these names.
    """
    names = [name.replace("-", "_") for name in given]
    if unknown := [repr(name) for name, known in zip(given, names, strict=True) if known not in CURVATURES]:
        raise InvalidInputError(f"unknown curvature {', '.join(unknown)}; there are: {', '.join(CURVATURES)}")
    return names


def restricted(
    risk: EmpiricalRisk, block: Block | None, build: Callable[[EmpiricalRisk], SymmetricOperator]
) -> SymmetricOperator:
    """`build(risk)`, or its diagonal block; only the block's tensors are differentiated."""
    if block is None:
        return build(risk)
    layer = block if isinstance(block, str) else block[0]
    inner = risk.restrict(risk.space.layer_names(layer))
    operator = build(inner)
    return operator if isinstance(block, str) else Restriction(operator, inner.space.indices(block))
