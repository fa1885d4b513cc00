"""Known null directions of curvature matrices: candidates from structure and data, each verified by a product."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bnp_analysis.curvature import CURVATURES, gauss_newton
from bnp_analysis.curvature.engines import curvature_names
from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.bases import Block as LocalBlock
from bnp_analysis.linalg.matrices import LocalColumns
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, require_digits
from bnp_analysis.linalg.spectra.checks import Verifier
from bnp_analysis.network.batches import slice_batch
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.results import Result
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.trees import map_leaves, tensors_of
from bnp_analysis.symmetry.candidates import Candidate, Chart, NullBasis, Orbit, Part
from bnp_analysis.symmetry.constraints import Activation, Constant, Constraints, Parameters, Value, fixed, values_in
from bnp_analysis.symmetry.from_data import Counted, UnreadOutputs, dependent_inputs, without_effect
from bnp_analysis.symmetry.graph import Graph, Node, Slot
from bnp_analysis.symmetry.recording import arguments_by_name, record_graph
from bnp_analysis.symmetry.solutions import Mixer, frames, scale_candidates

# How often the numbers of candidates are held: given, unit, sparse with indices, and what they become.
_COPIES = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class NullDirections(Result):
    """Verified null directions of a curvature matrix, in the coordinates of its parameters.

    Attributes:
        blocks: the same orthonormal columns, each on the coordinates that it lives on: `(positions (p,), (p, k))`.
        dim: `n`.
        sources: cause -> how many dimensions it adds to those before it; they sum to `r`.
        approximate: cause -> `(count, largest |F t| / |F| |t|)` of directions that are null only in the limit of a
            normalization's eps; never part of the basis.
        rejected: cause -> `(count, largest |F t| / |F| |t|)` of candidates that turned out not to be null.
        residual: cause -> `(count, largest |A t| / |A| |t|)` of directions that the Gauss-Newton matrix annihilates and
            the matrix `A` asked for does not; for the Hessian and a linear generator `B` it is `|B^T grad|`.
        not_analysed: parts of the network that could not be read.
    """

    blocks: tuple[LocalBlock, ...]
    dim: int
    sources: Mapping[str, int]
    approximate: Mapping[str, tuple[int, float]]
    rejected: Mapping[str, tuple[int, float]]
    not_analysed: tuple[str, ...]
    residual: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    # Maps, not numbers: files do not hold them.
    _orbits: ClassVar[tuple[Orbit, ...]] = ()

    @cached_property
    def columns(self) -> LocalColumns:
        """`N (n, r)` by its products, `N @ c` and `N.T @ v`: it takes what its blocks take, not `n r` numbers."""
        return LocalColumns(self.dim, self.blocks)

    @cached_property
    def basis(self) -> Tensor:
        """`N (n, r)`, orthonormal, as a dense matrix; the result is accepted wherever `null=` is.

        Raises:
            MemoryLimitError: it does not fit; `columns` has its products without it.
        """
        shape, like = self.columns.shape, self.blocks[0][1]
        size = shape[0] * shape[1] * like.element_size()
        require_memory(size, f"{shape[1]} null directions as a dense matrix (.columns multiplies)", device=like.device)
        return self.columns.to_dense()

    @property
    def orbits(self) -> tuple[Orbit, ...]:
        """The finite symmetries behind the directions, where a formula is known: scales, shifts, mixings of two."""
        return self._orbits

    def orbit(self, cause: str, index: int = 0) -> Orbit:
        """One of the finite symmetries of a cause.

        Args:
            cause: a key of `sources`.
            index: which of them, in the order in which they were found.

        Raises:
            InvalidInputError: there is none: data, not structure, make these directions null; or the result was read
                from a file.
        """
        mine = [orbit for orbit in self.orbits if orbit.cause == cause]
        if not -len(mine) <= index < len(mine):
            known = sorted({orbit.cause for orbit in self.orbits})
            raise InvalidInputError(
                f"{len(mine)} finite symmetries of {cause!r}, so none has index {index}; there are some of: "
                f"{', '.join(known) or 'no cause (files do not hold them)'}"
            )
        return mine[index]

    def summary(self) -> str:
        """Counts by cause."""
        parts = ", ".join(f"{cause} {count}" for cause, count in self.sources.items()) or "none"
        text = f"{self.columns.shape[1]} null directions of {self.dim} ({parts})"
        others = {"approximate": self.approximate, "rejected": self.rejected}
        for title, book in (others | {"of the Gauss-Newton matrix only": self.residual}).items():
            if book:
                text += f"; {title}: " + ", ".join(f"{c} {n} ({s:.1g})" for c, (n, s) in book.items())
        return text + (f"; not analysed: {'; '.join(self.not_analysed)}" if self.not_analysed else "")

    def records(self) -> list[dict[str, object]]:
        """One row per cause."""
        return [{"cause": cause, "dimensions": count} for cause, count in self.sources.items()]

    def inside(self, positions: Tensor) -> Tensor:
        """The basis vectors that vanish outside some coordinates, on these: `(len(positions), k)`.

        They are null directions of the principal block at these coordinates, for instance of one unit.
        """
        return self.basis[positions][:, self._alone(positions)]

    def _alone(self, positions: Tensor) -> Tensor:
        outside = torch.ones(self.basis.shape[0], dtype=torch.bool, device=self.basis.device)
        outside[positions] = False
        return (self.basis[outside] == 0).all(dim=0)


@gated
def null_directions(
    risk: EmpiricalRisk,
    *,
    curvature: str = "gauss_newton",
    block: Block | None = None,
    factor: LinearOperator | None = None,
) -> NullDirections:
    """Directions `t` with `F t = 0`, `F^T F` the Gauss-Newton matrix, from the symmetries and the data of a network.

    Causes (T11), the most local first: parameters without effect, dependent inputs, rows that a ReLU or a max-pooling
    cuts, dead units; what a normalization, the layers behind or the loss do not read of a layer's outputs; scales,
    shifts and mixings of channels along residual streams, of homogeneous units, linear layers, always-active units,
    attention heads, the affine part of a normalization; rotations of a stream that only norms and linear layers read.
    Each is verified, relative: by a product or the rows of `F`; where those are many, by 48 Gaussian combinations of
    them. These hold each direction to a quarter of the tolerance and miss one above it with a probability of 1e-19, the
    sum of which is in `settings`; sizes in the books are then known to some ten percent. Scales before a normalization
    with eps > 0 are measured and reported as approximate, however small they are.

    For `curvature="hessian"`, the part of their span that the Hessian `H` annihilates as well. A symmetry of the risk
    is null for it where it is a translation (shifts before a softmax, dependent inputs of the network, dead units);
    where it is linear, `theta -> exp(s B) theta`, it is `H B theta = -B^T grad`, zero at critical points and for the
    `B` that the gradient does not see: linear networks have many. What is left of `B^T grad` is in `residual`; below
    the rounding of a product it counts as nothing.

    Args:
        risk: the empirical risk.
        curvature: `"gauss_newton"` or another curvature matrix, as in `condition`.
        block: only directions inside a layer, or inside one output unit `(layer, i)`.
        factor: of the Gauss-Newton matrix of the risk, or of the layer's block, for instance a reduced one; default
            the Gauss-Newton operator's own.

    Returns:
        `NullDirections`; the rank is that of the union. What the data do not determine beyond these causes is not
        counted as explained.

    Raises:
        InvalidInputError: no such block; MemoryLimitError: the candidates do not fit.

    Source: T11.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(20, 2, dtype=torch.float64), torch.arange(20) % 3
        >>> model = torch.nn.Linear(2, 3, dtype=torch.float64)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
        >>> bnp.null_directions(risk).sources
        {'softmax shift': 3}
        >>> bnp.null_directions(risk, curvature="hessian").sources
        {'softmax shift': 3}
    """
    require_digits(risk.eps, str(risk.precision), "null directions", cast=True)
    if block is None:
        return search(risk, curvature, factor)
    began, layer = time.perf_counter(), block if isinstance(block, str) else block[0]
    inner = risk.restrict(risk.space.layer_names(layer))
    found = search(inner, curvature, factor)
    return found if isinstance(block, str) else _unit(found, inner.space.indices(block), began)


def search(
    risk: EmpiricalRisk,
    curvature: str = "gauss_newton",
    factor: LinearOperator | None = None,
    recorded: RecordedNetwork | None = None,
) -> NullDirections:
    """The search of `null_directions` for all free parameters of a risk.

    Args:
        risk: the empirical risk.
        curvature, factor: as in `null_directions`.
        recorded: of a risk that this one is a restriction of, where several are searched.
    """
    began, (name,) = time.perf_counter(), curvature_names(curvature)
    # The search reads all data at once: with several processes each has them all, and finds the same.
    risk = risk.gathered()
    if factor is not None and factor.shape[1] != risk.space.dim:
        raise InvalidInputError(f"the factor has {factor.shape[1]} columns, the parameters are {risk.space.dim}")
    if name != "gauss_newton" and risk.space.dtype != torch.float64 and risk.space.device.type != "mps":
        # What another matrix annihilates too is decided by its products, which in float32 hide up to 1e-3 of it.
        return _rounded(search(risk.to(torch.float64), name), risk, name, began)
    candidates, skipped = candidate_directions(risk, recorded)
    count = sum(c.count for c in candidates)
    numbers = sum(part.values.numel() for c in candidates for part in c.parts)
    require_memory(_COPIES * 8 * numbers, "the basis of the candidate null directions")
    A = gauss_newton(risk)
    verifier = Verifier(factor or A.factor or A, count)
    approximate: dict[str, tuple[int, float]] = {}
    rejected: dict[str, tuple[int, float]] = {}
    orbits: list[Orbit] = []
    turns: list[tuple[str, list[Part]]] = []
    for candidate, parts in zip(candidates, _verified(candidates, verifier, rejected, approximate), strict=True):
        if not (turns and turns[-1][0] == candidate.cause):
            turns.append((candidate.cause, []))
        turns[-1][1].extend(part for part in parts if part.count)
        kept = zip(parts, candidate.orbits, strict=False)
        orbits += [orbit for part, orbit in kept if part.count and orbit is not None]
    basis, begin = NullBasis(risk.space.dim), 0
    while begin < len(turns):
        for turn in range(begin, len(turns)):
            basis.add(*turns[turn], turn)
        failed = basis.settle(verifier)
        begin = len(turns) if failed is None else failed + 1
    found = NullDirections(
        blocks=basis.blocks(risk.theta),
        dim=risk.space.dim,
        sources=basis.counts(),
        approximate=approximate,
        rejected=rejected,
        not_analysed=tuple(skipped),
        settings={"tolerance": verifier.tolerance, "failure_probability": verifier.doubt * count},
        engine=risk.provenance,
        matvecs=verifier.matvecs,
        seconds=time.perf_counter() - began,
    )
    if name != "gauss_newton":
        found = replace(_annihilated(found, CURVATURES[name](risk, seed=0)), seconds=time.perf_counter() - began)
    object.__setattr__(found, "_orbits", tuple(orbits))
    return found


def _rounded(found: NullDirections, risk: EmpiricalRisk, name: str, began: float) -> NullDirections:
    """The directions of a risk in float64 for the same risk in its own dtype, whose decisions may be others."""
    blocks = tuple((where, columns.to(risk.theta)) for where, columns in found.blocks)
    own = _annihilated(replace(found, blocks=blocks), CURVATURES[name](risk, seed=0))
    residual = dict(found.residual)
    for cause, (count, size) in own.residual.items():
        known, worst = residual.get(cause, (0, 0.0))
        residual[cause] = (known + count, max(worst, size))
    own = replace(own, residual=residual, engine=risk.provenance, seconds=time.perf_counter() - began)
    object.__setattr__(own, "_orbits", found.orbits)
    return own


def _annihilated(found: NullDirections, A: SymmetricOperator) -> NullDirections:
    """The part of the span of null directions that `A` annihilates too, cause after cause.

    A column that is null by itself is kept as it is, with its zeros. Of the others, combinations may be: the kernel of
    `A N`, whose dimension grows with every cause that joins.
    """
    verifier = Verifier(A, found.basis.shape[1])
    # Verbs check what they are given, against their own estimate of the norm.
    tolerance = verifier.tolerance / 2
    images = verifier.images(found.basis)
    sizes = images.norm(dim=0)
    causes = [cause for cause, count in found.sources.items() for _ in range(count)]
    alone = [i for i, size in enumerate(sizes.tolist()) if size <= tolerance]
    others = sorted(set(range(len(causes))) - set(alone))
    labels, residual = [causes[i] for i in alone], dict[str, tuple[int, float]]()
    triangle = torch.linalg.qr(images[:, others], mode="r")[1]
    kernel = triangle.new_zeros(len(others), 0)
    for cause in dict.fromkeys(causes[i] for i in others):
        mine = [j for j, i in enumerate(others) if causes[i] == cause]
        _, sigma, vh = torch.linalg.svd(triangle[:, : mine[-1] + 1])
        null = triangle.new_zeros(len(others), int((sigma <= tolerance).sum()))
        null[: mine[-1] + 1] = vh[len(sigma) - null.shape[1] :].T
        new = null.shape[1] - kernel.shape[1]
        grown = torch.linalg.svd(null - kernel @ (kernel.T @ null), full_matrices=False)[0][:, :new]
        kernel, labels = torch.cat([kernel, grown], dim=1), labels + [cause] * new
        if new < len(mine):
            residual[cause] = (len(mine) - new, float(sizes[[others[j] for j in mine]].max()))
    basis = torch.cat([found.basis[:, alone], found.basis[:, others] @ kernel.to(found.basis)], dim=1)
    names = [cause for cause in found.sources if cause in labels]
    order = sorted(range(len(labels)), key=lambda j: names.index(labels[j]))
    return replace(
        found,
        blocks=_whole(basis[:, order]),
        sources={cause: labels.count(cause) for cause in names},
        residual=residual,
        matvecs=found.matvecs + verifier.matvecs,
    )


def _verified(
    candidates: list[Candidate],
    verifier: Verifier,
    rejected: dict[str, tuple[int, float]],
    approximate: dict[str, tuple[int, float]],
) -> Iterator[list[Part]]:
    """The columns of each candidate's parts that are null; the others go into the books, and all that are not exact."""
    nonzero = [[Part(p.positions, p.values[:, p.values.norm(dim=0) > 0]) for p in c.parts] for c in candidates]
    sizes = iter(verifier.sizes([(part.positions, part.values) for parts in nonzero for part in parts]))
    for candidate, parts in zip(candidates, nonzero, strict=True):
        book, kept = rejected if candidate.exact else approximate, []
        for part in parts:
            size = next(sizes)
            null = (size <= verifier.tolerance) & candidate.exact
            if not bool(null.all()):
                known, worst = book.get(candidate.cause, (0, 0.0))
                book[candidate.cause] = (known + int((~null).sum()), max(worst, float(size[~null].max())))
            kept.append(Part(part.positions, part.values[:, null]))
        yield kept


def _counted(risk: EmpiricalRisk) -> list[Tensor | None] | None:
    """Which outputs the loss looks at, for each batch: a softmax weight of zero takes an example out.

    Not what saturation has made zero: its curvature is small, and only its rounding says none.
    """
    if not risk.batches.ordered:
        return None
    found: list[Tensor | None] = []
    tensors = risk.space.unflatten(risk.theta)
    for batch in risk.batches:
        with torch.no_grad():
            outputs = risk.batch_outputs(tensors, batch)
        root = output_root(risk, batch, outputs, positions=True)
        if root is None or root.scale is None or root.probabilities is None:
            found.append(None)
        else:
            certain = (root.probabilities.max(dim=1).values == 1).logical_or(root.scale != 0)
            found.append(root.in_outputs(certain.unsqueeze(1).expand(root.probabilities.shape), outputs.shape))
    # A loss without any curvature looks at nothing; its network is read as for another loss.
    return found if any(counted is None or bool(counted.any()) for counted in found) else None


def _whole(basis: Tensor) -> tuple[LocalBlock]:
    """A dense basis as a single block."""
    return ((torch.arange(len(basis), device=basis.device), basis),)


def _unit(found: NullDirections, positions: Tensor, began: float) -> NullDirections:
    """Of the directions of a layer, those of one unit."""
    basis, inside = found.inside(positions), found._alone(positions).tolist()
    causes = [cause for cause, count in found.sources.items() for _ in range(count)]
    sources = Counter(cause for cause, mine in zip(causes, inside, strict=True) if mine)
    return replace(
        found, blocks=_whole(basis), dim=len(basis), sources=dict(sources), seconds=time.perf_counter() - began
    )


# The search.


class RecordedNetwork:
    """What is read of a network once, for all choices of free parameters among those of a risk.

    Args:
        risk: the empirical risk; its data are run once, and what layers and norms receive and return is held.

    Raises:
        MemoryLimitError: the activations do not fit.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        risk = risk.gathered()
        counted = _counted(risk)
        self.graphs = _graphs(risk, counted)
        self.graph = self.graphs[0]
        self.alike = all(self.graph.same_operations(other) for other in self.graphs)
        if self.alike and not self.graph.transformed:
            chart = Chart(risk, self.graph)
            self.constraints, self.unfollowed = follow(Constraints(chart, _with_calls(risk, self.graph), self.graphs))
            self.frames = frames(self.constraints)
            self.unread = UnreadOutputs(risk, chart, self.graph, self.constraints.uses, counted)


def candidate_directions(
    risk: EmpiricalRisk, recorded: RecordedNetwork | None = None
) -> tuple[list[Candidate], list[str]]:
    """Candidates of every cause, the most local first, and what could not be analysed.

    Inside one unit: parameters without effect, dependent inputs, inactive rows, dead units. Inside one layer: what
    nothing reads, because a norm, a layer behind or the loss takes it out. Across layers: scales, shifts and mixings
    of channels, wherever they are made and read. Nothing here is believed before it is verified.

    Args:
        risk: the empirical risk.
        recorded: of this risk, or of one that it is a restriction of; default its own.

    Returns:
        The candidates in `risk.space`, and words for what was left out.

    Raises:
        MemoryLimitError: the activations do not fit.

    Source: T11.
    """
    read, skipped = recorded or RecordedNetwork(risk), list[str]()
    if not read.alike:
        return [], ["the operations depend on the batch"]
    chart = Chart(risk, read.graph)
    found = [without_effect(chart, read.graphs), *dependent_inputs(chart, read.graphs, skipped)]
    if read.graph.transformed:
        return [c for c in found if c.count], [*skipped, "passes through transforms of torch.func or .grad"]
    constraints = read.constraints.on(chart)
    found += read.unread.candidates(chart, constraints.uses)
    found += scale_candidates(constraints)
    mixer = Mixer(constraints)
    for frame in read.frames:
        found += mixer.candidates(frame)
    unfollowed = [f"{name}: used by {kind}" for name, kind in read.unfollowed if name in chart.space]
    skipped += [*constraints.skipped, *unfollowed]
    return [c for c in sorted(found, key=lambda c: not c.exact) if c.count], list(dict.fromkeys(skipped))


def _graphs(risk: EmpiricalRisk, counted: Counted) -> list[Graph]:
    graphs: list[Graph] = []
    for batch in risk.batches:
        graphs.append(record_graph(risk, batch, None if counted is None else counted[batch.index]))
        if len(graphs) == 1:
            tensors = [t for n in graphs[0] for t in (n.received, n.output, n.reach, n.signs) if t is not None]
            held = sum(t.numel() * t.element_size() for t in tensors)
            where = tensors[0].device if tensors else None
            require_memory(int(held * risk.batches.total / batch.count), "what the layers receive", device=where)
    return graphs


def _with_calls(risk: EmpiricalRisk, graph: Graph) -> Graph:
    """The same operations on two examples, where they do the same; else on the first batch."""
    batch = next(iter(risk.batches))
    few = slice_batch(batch, 0, 2)
    if few is not None:
        # A model may be written for one size of batch.
        with suppress(RuntimeError, ValueError, IndexError):
            found = record_graph(risk, few, calls=True)
            if found.same_operations(graph):
                return found
    return record_graph(risk, batch, calls=True)


def follow(c: Constraints) -> tuple[Constraints, list[tuple[str, str]]]:
    """Let every operation write its demands.

    Returns:
        The constraints, and the parameters with the kinds of operations that use them in ways that are not followed.
    """
    unfollowed: list[tuple[str, str]] = []
    for node in c.graph:
        found = _outcome(c, node)
        if found is None:
            moving = [value for value in _operands(c, node) if _moves(value)]
            for value in moving:
                c.pin(value)
            unfollowed += [(name, node.kind) for name in node.parameters.values()]
            if any(isinstance(value, Activation) for value in moving):
                c.skipped.append(f"passes through {node.kind}")
            found = fixed(node.shape)
        made = found if isinstance(found, list) else [found] * node.outputs
        c.values |= {Slot(node.index, position): value for position, value in enumerate(made)}
    if c.graph.output is not None:
        c.pin(c.values[c.graph.output])
    return c, unfollowed


def _operands(c: Constraints, node: Node) -> Iterator[Value]:
    return values_in(c.value(arguments_by_name(node)))


def _moves(value: Value) -> bool:
    return isinstance(value, Parameters) or (isinstance(value, Activation) and bool((value.labels > 1).any()))


def _outcome(c: Constraints, node: Node) -> Value | list[Value] | None:
    """What an operation makes; None where it is not followed."""
    call, effect = node.call, node.operation.effect
    assert call is not None
    # What fails here is an operation like those without a rule; equations that it left behind only forbid more.
    with suppress(Exception):
        if all(isinstance(value, Constant) for value in _operands(c, node)):
            # Copied: some operations write into what they read.
            args, kwargs = (map_leaves(c.value(given), _number) for given in (call.positional, call.keywords))
            return [Constant(t.detach()) for t in tensors_of(call.function(*args, **kwargs))]
        return None if effect is None else cast(Value, effect(c, node, c.value(arguments_by_name(node))))
    return None


def _number(part: Any) -> Any:
    return part.value.clone() if isinstance(part, Constant) else part
