"""The state of torch while a user's model and loss run, and the conversion of their exceptions.

All code of a user runs inside `explained`: the model, the loss, `count=`, and their derivatives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

from bnp_analysis.errors import BNPAnalysisError, InvalidInputError, NoDerivativeError
from bnp_analysis.network.smooth import Accurate
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.threads import LOCK

_OTHERWISE = (
    "Replace it by operations of torch that have one (math attention, unfused recurrent cells, a lookup and a sum for "
    "EmbeddingBag), or freeze the parameters below it. gauss_newton and fisher need first derivatives of the model only"
)
_REMEDIES = {
    "Guard failed": "An exported program takes inputs of the sizes it was exported with; export it with dynamic sizes "
    "(torch.export.Dim for the examples), or give the module it was exported from",
}
_WRAPPER = once_differentiable(lambda *_: None).__code__
_REMEDY = "Run model and loss on this batch by themselves, in the dtype of the measurement, to see it happen"

Found = TypeVar("Found")
_Switch = tuple[Callable[[], bool], Callable[[bool], None]]

_KERNELS = ("math", "flash", "mem_efficient", "cudnn", "overrideable")
_ATTENTION: list[_Switch] = [
    (getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
    for name in _KERNELS
    if hasattr(torch._C, f"_get_{name}_sdp_enabled")  # older versions know fewer
]
_RECURRENT: list[_Switch] = [
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
]


# What `torch.utils.checkpoint` calls to drop activations and compute them again in the backward pass, where it would
# take the model's own parameters for those that are differentiated.
_CHECKPOINTS: dict[str, Any] = {
    "CheckpointFunction": SimpleNamespace(apply=lambda function, preserve, *args: function(*args)),  # reentrant
    "_checkpoint_hook": lambda frame: nullcontext(),
}


class KernelMode(TorchDispatchMode):
    """Sees every kernel that runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch does not annotate it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would load its compiler


@contextmanager
def recording() -> Iterator[None]:
    """Derivatives are recorded even where the caller has turned that off, with `no_grad` or `inference_mode`."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        with full_float32:
            yield
        return
    with full_float32, torch.inference_mode(False), torch.enable_grad():
        yield


def with_differentiable_kernels(run: Callable[[], Found], *, recurrent: bool) -> Found:
    """`run()` by kernels that have a right second derivative, uncompiled.

    Math attention, native recurrent layers, activations that are kept where a model checkpoints them, and
    what `Accurate` puts in place of torch's functions.

    Which kernels torch takes belongs to the process: other threads wait, and an interrupt cannot leave it changed.
    """
    switches = [*_ATTENTION, *(_RECURRENT if recurrent else [])]
    # Functions compiled inside forward() run eagerly. Who compiled one has loaded the compiler.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame") if hasattr(torch.compiler, "set_stance") else None
    with LOCK:
        before = [is_on() for is_on, _ in switches]
        stance = None if dynamo is None else dynamo._stance
        checkpoints = vars(torch.utils.checkpoint)
        recomputing = {name: checkpoints[name] for name in _CHECKPOINTS}

        def restore() -> None:
            checkpoints.update(recomputing)
            for (_, switch), on in zip(switches, before, strict=True):
                switch(on)
            if dynamo is not None:
                dynamo._set_stance(stance)

        try:
            checkpoints.update(_CHECKPOINTS)
            for i, (_, switch) in enumerate(switches):
                switch(i == 0)
            if dynamo is not None:
                torch.compiler.set_stance("force_eager")
            with Accurate():
                return run()
        finally:
            try:
                restore()
            except KeyboardInterrupt:
                restore()
                raise


@contextmanager
def explained(what: str, model: nn.Module | None = None) -> Iterator[None]:
    """The one gate of foreign errors: they leave as the project's, from the original.

    Args:
        what: would have been computed, with the batch: "the outputs of batch 3".
        model: whose module it was that failed, if one ran, is named.

    Raises:
        InvalidInputError: what would have been computed, the module, torch's word for the operation, the ways out.
    """
    try:
        yield
    except (BNPAnalysisError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = str(error).strip()
        said = next(iter(text.splitlines()), "no message").rstrip(".")
        if "derivative for" in text or "once_differentiable" in text:
            raise no_derivative(said, second="backward" in said or "once_differentiable" in text, what=what) from error
        remedy = next((words for key, words in _REMEDIES.items() if key in text), _REMEDY)
        where = _module(error, model)
        raise InvalidInputError(
            f"{what} cannot be computed: {type(error).__name__}{where}: {said}. {remedy}"
        ) from error


def _module(error: BaseException, model: nn.Module | None) -> str:
    """The innermost module of the model whose call raised an error."""
    names = {} if model is None else {id(module): name for name, module in model.named_modules()}
    found, step = "", error.__traceback__
    while step is not None:
        module = step.tb_frame.f_locals.get("self")
        if id(module) in names:
            found = f" in {names[id(module)] or 'the model itself'} ({type(module).__name__})"
        step = step.tb_next
    return found


def derivative(
    outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Any], cotangents: Any = None, *, what: str, **how: Any
) -> list[Tensor]:
    """`torch.autograd.grad` through a user's operations, zero where an input is unused.

    Args:
        outputs, inputs, cotangents: as there; the cotangents of scalars may be left out.
        what: would have been computed.
        how: the other arguments of `torch.autograd.grad`.

    Raises:
        InvalidInputError: an operation without this derivative, named.
    """
    how = {"allow_unused": True, "materialize_grads": True} | how
    with explained(what):
        found = vector_jacobian(outputs, inputs, cotangents, **how)
    if how.get("create_graph"):
        # What they give back is a constant to torch, or ends in a node that it leaves out: zeros would come back.
        once = {node.name() for node in nodes_of(outputs) if _once(node)}
        if once or any(node.name() == "torch::autograd::Error" for node in nodes_of(found)):
            said = f"one of {', '.join(sorted(once)) or 'its custom operations'} is marked once_differentiable"
            raise no_derivative(said, second=True, what=what)
    return found


def vector_jacobian(
    outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Any], cotangents: Any = None, **how: Any
) -> list[Any]:
    """`torch.autograd.grad` without the import of a computer algebra system, which compares symbolic shapes there.

    That takes half a second in every process; plain tensors of one shape need no comparison.
    """
    run: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)  # private to torch
    ends, given = ([t] if isinstance(t, Tensor) else t for t in (outputs, cotangents))
    if (
        run is None
        or not isinstance(given, tuple | list)
        or not all(
            type(u) is Tensor and u.shape == t.shape and u.dtype == t.dtype for t, u in zip(ends, given, strict=True)
        )
        or any(t.is_nested for t in ends)
        or how.keys() - {"retain_graph", "create_graph", "allow_unused", "materialize_grads"}
        or torch._C._len_torch_function_stack()
    ):
        return list(torch.autograd.grad(outputs, inputs, cotangents, **how))
    create = how.get("create_graph", False)
    wanted = (inputs,) if isinstance(inputs, Tensor | GradientEdge) else tuple(inputs)
    fill = how.get("materialize_grads", False)
    retain, unused = how.get("retain_graph", create), how.get("allow_unused", False) or fill
    found = run(tuple(ends), tuple(given), retain, create, wanted, unused, accumulate_grad=False)
    if not fill:
        return list(found)
    return [torch.zeros_like(t, requires_grad=create) if g is None else g for g, t in zip(found, wanted, strict=True)]


def nodes_of(tensors: Tensor | Iterable[Tensor]) -> list[Any]:
    """The recorded operations behind some tensors."""
    found: dict[torch.autograd.graph.Node, None] = {}
    waiting = [t.grad_fn for t in ([tensors] if isinstance(tensors, Tensor) else tensors)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [following for following, _ in node.next_functions]
    return [*found]


def _once(node: torch.autograd.graph.Node) -> bool:
    """Whether a custom operation is marked `once_differentiable`, whose wrappers share their code."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _WRAPPER


def no_derivative(said: str, *, second: bool, what: str) -> NoDerivativeError:
    """The error for an operation without a derivative."""
    order = "second derivative" if second else "derivative"
    return NoDerivativeError(
        f"{what} cannot be computed: an operation of the model or the loss has no {order} in torch: {said}. "
        f"{_OTHERWISE}"
    )
