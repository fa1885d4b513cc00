"""What one example takes: the operations of a gradient, and the rows that it puts into every layer."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.layers import Coverage
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.trees import tensors_of

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


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not annotate it
    """Counts by torch's formulas. Its own `FlopCounterMode` would load the compiler, which takes a second."""

    total = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += 0.0 if formula is None else float(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _counted(risk: EmpiricalRisk, batch: Batch, layers: Coverage) -> tuple[float, dict[str, float]]:
    size = tensors_of(batch.x)[0].shape[0]
    _, seen = risk.record(batch, layers)
    rows = {layer.name: sum(layer.output_rows(output) for _, output in seen[layer.name]) / size for layer in layers}
    with _Operations() as counter:  # type: ignore[no-untyped-call]
        tensors = risk.leaves()
        risk.pullback(risk.batch_loss(risk.batch_outputs(tensors, batch), batch, tensors), tensors)
    return counter.total / size, rows
