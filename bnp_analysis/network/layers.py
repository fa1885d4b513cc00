"""Which layers of a model are covered, by their modules and by the use of their weights in a pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.kernels import KernelMode, derivative
from bnp_analysis.network.layer_kinds import KINDS, Layer, by_module, kind_of, kinds_of
from bnp_analysis.network.observation import transformed
from bnp_analysis.network.recorded_product import Recorded
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.smooth import untransformed
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.trees import tensors_of

# The functions by which torch's own layers multiply with their weights.
_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d, F.embedding)


@dataclass(frozen=True)
class Coverage:
    """Which layers' parameters are covered, and why the others are not.

    Attributes:
        covered: the layers, in the order of the modules.
        uncovered: parameter name -> reason.
    """

    covered: tuple[Layer, ...]
    uncovered: dict[str, str]

    def __getitem__(self, name: str) -> Layer:
        return {layer.name: layer for layer in self.covered}[name]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.covered)

    def without(self, which: Callable[[Layer], object], why: str) -> Coverage:
        """Without some of the layers, which are named with the reason."""
        left = [layer for layer in self.covered if which(layer)]
        names = [name for layer in left for name in (layer.weight, layer.bias) if name is not None]
        kept = tuple(layer for layer in self.covered if layer not in left)
        return Coverage(kept, self.uncovered | dict.fromkeys(names, why)) if left else self


@gated
def coverage(risk: EmpiricalRisk, also: Iterable[type[nn.Module]] = ()) -> Coverage:
    """Find the covered layers of a risk: those whose forward runs and whose weight is free and used once.

    Args:
        risk: the empirical risk; one forward pass over its data is made.
        also: types of layers that are covered only where they are asked for, such as `nn.Embedding`.

    Returns:
        A `Coverage`; every parameter of the space is covered or named with its reason.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> from bnp_analysis.network import coverage
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (torch.ones(4, 2), torch.ones(4, 1)))
        >>> found = coverage(risk)
        >>> [layer.name for layer in found], sorted(found.uncovered)
        (['0', '2'], ['1.bias', '1.weight'])
    """
    layers, reasons = layers_of(risk.modules(), risk.space.__contains__, also)
    runs: set[str] = set()
    other: dict[str, str] = {}
    for own_runs, own_other in risk.group.share(lambda: _own_forward_uses(risk, layers), "which layers run"):
        runs, other = runs | own_runs, own_other | other
    covered = []
    for layer in layers:
        if layer.name not in runs:
            reasons[layer.weight] = f"the forward of {layer.name or type(layer.module).__name__} never runs"
        elif layer.name in other:
            reasons[layer.weight] = other[layer.name]
        else:
            covered.append(layer)
    taken = {name for layer in covered for name in (layer.weight, layer.bias)}
    return Coverage(tuple(covered), {name: reasons[name] for name in risk.space.names if name not in taken})


def layers_of(
    modules: Iterable[tuple[str, nn.Module]],
    free: Callable[[str], bool] = lambda name: True,
    also: Iterable[type[nn.Module]] = (),
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that the structure of a model allows to be covered: of a known kind, with a weight of their own.

    Args:
        modules: those of the model, under their names.
        free: whether a parameter of this name counts; default all.
        also: types of layers that are covered only where they are asked for.

    Returns:
        The layers in the order of the modules; and parameter name -> why it would belong to none of them, for all.

    Raises:
        InvalidInputError: a lazy layer that has no shape yet, or a type in `also` that is none of layers.
    """
    modules, wanted = list(modules), require_types(also)
    holders: dict[int, list[str]] = {}
    owners: dict[str, tuple[nn.Module, list[str]]] = {}
    for name, module in modules:
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            if free(full):
                holders.setdefault(id(parameter), []).append(name)
                owners[full] = module, holders[id(parameter)]
    layers, why = [], {name: _reason(name, module, held) for name, (module, held) in owners.items()}
    for name, module, kind in ((n, m, kind) for n, m in modules for kind in kinds_of(m)):
        prefix = f"{name}." if name else ""
        if len(owners.get(f"{prefix}{kind.weight}", (None, ()))[1]) != 1:
            continue
        not_asked = f"covered where it is asked for, also=[{kind.module_type.__name__}]"
        if left := kind.layer.refused(module) if not kind.asked or isinstance(module, wanted) else not_asked:
            why |= {n: left for n in (f"{prefix}{kind.weight}", f"{prefix}{kind.bias}") if n in why}
            continue
        if isinstance(kind.parameter(module), UninitializedParameter):
            raise InvalidInputError(f"lazy layer {name!r} has no shape yet: run one forward pass first")
        layers.append(kind.of(name, module, bias=len(owners.get(f"{prefix}{kind.bias}", (None, ()))[1]) == 1))
    return layers, why


def require_types(also: Iterable[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    """The types of layers that are asked for.

    Raises:
        InvalidInputError: one that is no type of layers that can be covered.
    """
    wanted = tuple(also) if isinstance(also, Iterable) else (also,)
    for one in wanted:
        if not any(isinstance(one, type) and issubclass(one, known) for known in KINDS):
            asked = ", ".join(kind.__name__ for kind, entry in KINDS.items() if entry.asked)
            raise InvalidInputError(
                f"also= takes types of layers that are not covered unless they are asked for ({asked}), got {one!r}"
            )
    return wanted


def _reason(name: str, owner: nn.Module, held: list[str]) -> str:
    if len(held) > 1:
        return f"tied: shared by {', '.join(held)}, whose inputs differ"
    if isinstance(owner, ParametrizationList):
        made = ", ".join(type(one).__name__ for one in owner)
        return f"parametrized by {made}: a weight is covered where it is one parameter times fixed numbers"
    kind = kind_of(owner)
    known = kind is not None
    if kind is not None and name.endswith(f"{kind.bias}_orig"):
        return "a pruned bias: the weights are covered without it"
    return (
        f"{type(owner).__name__} {'whose weight is frozen or not covered' if known else 'is not a covered layer type'}"
    )


def asked_types(modules: Mapping[str, nn.Module], names: Iterable[str]) -> list[type[nn.Module]]:
    """The types among the named modules that are covered only where they are asked for."""
    kinds = [kind_of(modules[name]) for name in names if name in modules]
    return [kind.module_type for kind in kinds if kind is not None and kind.asked]


def changed_product(module: nn.Module) -> str:
    """The reason for which a layer is left out whose rows are not its input, or whose weights are others."""
    return f"{type(module).__name__} computes something else with its weight or its input"


def no_product(module: nn.Module) -> str:
    """The reason for which a module is left out that looks like a dense layer and does something else, or more."""
    return f"{type(module).__name__} does something else than to multiply its input by its weight and add its bias"


def _own_forward_uses(risk: EmpiricalRisk, layers: list[Layer]) -> tuple[set[str], dict[str, str]]:
    """Which layers run on this process's batches; why some are more, or less, than a product with their weight."""
    known = by_module(layers)
    runs: dict[str, int] = {}
    other: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    calls = _Calls(Recorded() if any(layer.kind.recognized for layer in layers) else None)
    stored = risk.theta.untyped_storage().data_ptr()

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        for layer in known.get(name, ()):
            runs[layer.name] = runs.get(layer.name, 0) + 1
            weight = weights[layer.name] = layer.own_weight
            if transformed(weight) or weight.untyped_storage().data_ptr() != stored:
                other[layer.name] = "its forward runs with other weights than its own (torch.func inside forward())"
            elif layer.inner and layer.kind.changes_product(module):
                other[layer.name] = changed_product(module)
            elif layer.inner:
                with calls.paused():
                    if not _is_loop(layer, args, output):
                        other[layer.name] = f"{type(module).__name__} does not compute what a loop over its steps does"
            elif layer.kind.recognized:
                if not calls.proves(layer, args[0], output):
                    other[layer.name] = no_product(module)
            elif not layer.kind.builtin:
                if not _is_product(layer, args[0], output):
                    said = f"{type(module).__name__} does not compute the product that it was registered for"
                    other[layer.name] = said
            elif layer.kind.changes_product(module) and not calls.multiply(args[0], weight):
                other[layer.name] = changed_product(module)
        if not name:
            calls.clear()

    with calls:
        risk.capture(visit, {*known, ""}, numbers=False)
    for name, w in weights.items():
        if calls.uses_of(w) > runs[name]:
            other.setdefault(name, "its weight is also used outside of its own product")
    return {*runs}, other


def _is_product(layer: Layer, h: Tensor, output: Tensor) -> bool:
    """Whether an output is the product of the layer's rows and weights, to half of the digits."""
    with torch._C.DisableTorchFunction():
        seen = untransformed(output).detach()
        try:
            product, size = layer.product(untransformed(h).detach())
            return bool(((layer.by_unit(seen) - product).abs() <= torch.finfo(size.dtype).eps ** 0.5 * size).all())
        except RuntimeError:  # shapes that do not fit
            return False


def _is_loop(layer: Layer, args: Any, output: Any) -> bool:
    """Whether a module's output and its layers' inputs are, to half of the digits, those of its loop over time."""
    try:
        apart = layer.apart(args)
        if apart is None:
            return False
        again, products = apart
        seen = layer.rows(layer.inputs(args, output)[layer.kind.weight])
        rows = torch.cat([layer.rows(h) for h, _ in products[layer.kind.weight]])
        # Up to the order of the rows: a direction may run backwards.
        found, expected = [*tensors_of(output), seen.sort(0)[0]], [*tensors_of(again), rows.sort(0)[0]]
        return len(found) == len(expected) and all(map(_close, found, expected))
    except (RuntimeError, TypeError, KeyError):  # arguments in another order, a pass without products
        return False


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to half of the digits."""
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    return bool(((a - b).abs() <= torch.finfo(a.dtype).eps ** 0.5 * b.abs().amax().clamp_min(1)).all())


class _Calls(TorchFunctionMode):
    """The inputs and weights of products as layers compute them; how often each tensor goes into a function."""

    def __init__(self, recorded: Recorded | None) -> None:
        super().__init__()
        self._products: list[tuple[Any, Any]] = []
        self._recorded = recorded
        self._open = True
        # By identity, which a freed tensor hands on: the reference tells whose count it is.
        self._uses: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._open:
            return out
        if func in _FUNCTIONS:
            named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self._products.append((named["input"], named["weight"]))
        if self._recorded is not None:
            self._recorded.note(func, args, kwargs, out)
        if isinstance(out, Tensor):
            for t in tensors_of((list(args), kwargs)):
                self._uses[id(t)] = weakref.ref(t), self.uses_of(t) + 1
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is called meanwhile is no part of the pass."""
        self._open = False
        try:
            yield
        finally:
            self._open = True

    def multiply(self, h: Tensor, weight: Tensor) -> bool:
        """Whether one of the products was that of these two."""
        return any(x is h and w is weight for x, w in self._products)

    def proves(self, layer: Layer, h: Any, output: Any) -> bool:
        """Whether the output was made of the layer's product alone."""
        assert self._recorded is not None
        weight, bias = layer.own_weight, layer.own_bias
        return self._recorded.is_product(output, h, weight, bias, transposed=layer.kind.transposed)

    def clear(self) -> None:
        """Forget the products of a pass that has ended."""
        self._products.clear()
        if self._recorded is not None:
            self._recorded.clear()

    def uses_of(self, t: Tensor) -> int:
        """How many functions that give a tensor were given this one."""
        reference, count = self._uses.get(id(t), (None, 0))
        return count if reference is not None and reference() is t else 0


def products_only(
    layers: Iterable[Layer],
    leaves: Mapping[str, Tensor],
    outputs: Tensor,
    seen: Mapping[str, list[tuple[Tensor, Tensor]]],
) -> set[str]:
    """The layers whose weight acts on the outputs through its recorded products alone, found by a random cotangent.

    Derivatives inside `forward` use it once more: the rows that a layer sees are then not all of its work.

    Args:
        layers: covered ones.
        leaves, outputs, seen: given to, and returned by, `risk.record`.
    """
    layers = [layer for layer in layers if all(a.requires_grad for _, a in seen[layer.name])]
    if not layers:
        return set()
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(outputs)
    wanted = [leaves[layer.weight] for layer in layers] + [a for layer in layers for _, a in seen[layer.name]]
    found = iter(derivative(outputs, wanted, u, retain_graph=True, what="the derivatives by a layer's outputs"))
    wholes = [next(found) for _ in layers]
    alone = set()
    for layer, stored in zip(layers, wholes, strict=True):
        whole = layer.matrix(stored)
        total, bound = torch.zeros_like(whole), torch.zeros_like(whole)
        for h, _ in seen[layer.name]:
            r, g = layer.rows(h), layer.by_unit(next(found))
            g = g.reshape(len(g), layer.groups, -1)
            total += torch.einsum("rgu,rgm->gum", g, r).reshape(whole.shape)
            bound += torch.einsum("rgu,rgm->gum", g.abs(), r.abs()).reshape(whole.shape)
        if bool(((whole - total).abs() <= torch.finfo(whole.dtype).eps ** 0.5 * bound).all()):
            alone.add(layer.name)
    return alone


_FEW = 2


def work_of_an_example(risk: EmpiricalRisk, layers: Coverage) -> tuple[float, dict[str, float]]:
    """Floating-point operations of a gradient, by one example; layer name -> rows of one example.

    Matrix products and convolutions are counted while they run on two examples; on a whole batch where it cannot be
    cut. All processes get the same answer.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.ones(9, 5), torch.ones(9, 2)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(5, 2), torch.nn.functional.mse_loss, (x, y))
        >>> work_of_an_example(risk, bnp.network.coverage(risk))  # forward, and the gradient of the weights
        (40.0, {'': 1.0})
    """
    found = risk.group.share(lambda: _own_work(risk, layers), "what an example takes")
    first: tuple[float, dict[str, float]] = next(work for work in found if work is not None)
    return first


def _own_work(risk: EmpiricalRisk, layers: Coverage) -> tuple[float, dict[str, float]] | None:
    for batch in risk.batches:
        part = slice_batch(batch, 0, _FEW)
        if part is not None:
            # A model made for one size of batch fails on others.
            with suppress(RuntimeError, ValueError):
                return _counted(risk, part, layers)
        return _counted(risk, batch, layers)
    return None


class _Operations(KernelMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """Counts by torch's formulas. Its own `FlopCounterMode` would load the compiler, which takes a second."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += 0.0 if formula is None else float(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _counted(risk: EmpiricalRisk, batch: Batch, layers: Coverage) -> tuple[float, dict[str, float]]:
    size = tensors_of(batch.x)[0].shape[0]
    _, seen = risk.record(batch, layers)
    rows = {layer.name: sum(layer.output_rows(output) for _, output in seen[layer.name]) / size for layer in layers}
    with _Operations() as counter:
        tensors = risk.leaves()
        risk.pullback(risk.batch_loss(risk.batch_outputs(tensors, batch), batch, tensors), tensors)
    return counter.total / size, rows
