"""What goes into a model and what comes out: inputs that it cannot spoil, one tensor of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InconsistentDataError, InvalidInputError
from bnp_analysis.runtime.trees import map_tensors, tensors_of


class Inputs:
    """Gives a model its inputs: copies to one that writes into them, else the data themselves.

    A recorded graph holds its inputs, so copies would be kept once per graph. Which it is shows while the risk is
    constructed, where every batch is given as a copy and compared afterwards.
    """

    def __init__(self) -> None:
        self._copies, self._settled = True, False
        self.written = False

    def settle(self) -> None:
        """Every batch has been seen."""
        self._copies, self._settled = self.written, True

    @contextmanager
    def given(self, x: Any, own: bool = False) -> Iterator[Any]:
        """`x` for one forward pass; as it is where it is a copy of its own.

        Raises:
            InconsistentDataError: a model that left its inputs alone so far has written into them.
        """
        if own:
            yield x
            return
        leaves = tensors_of(x)
        if self._copies or any(t.is_inference() for t in leaves):
            with torch._C.DisableTorchFunction():
                copies = map_tensors(x, torch.clone)
            yield copies
            if not self._settled:
                with torch._C.DisableTorchFunction():
                    pairs = zip(leaves, tensors_of(copies), strict=True)
                    self.written = self.written or not all(torch.equal(a, b) for a, b in pairs)
            return
        with torch._C.DisableTorchFunction():
            # The same numbers: a model that asks for the gradient of its input asks it of a tensor of its own.
            aliases = map_tensors(x, Tensor.detach)
        with self.kept(x):
            yield aliases

    @contextmanager
    def kept(self, x: Any) -> Iterator[None]:
        """For a forward pass that gets the data themselves, or aliases of them.

        Raises:
            InconsistentDataError: it has written into them.
        """
        leaves = [t for t in tensors_of(x) if not t.is_inference()]
        versions = [t._version for t in leaves]
        yield
        if versions != [t._version for t in leaves]:
            raise InconsistentDataError(
                "the model wrote into its inputs, which it had not done when the risk was made: the data are no longer "
                "what they were. Let forward() begin with x = x.clone(), and make the risk again"
            )


def one_tensor(raw: Any, pick: Callable[[Any], Tensor] | None) -> Tensor:
    """The outputs of a model as the tensor that has derivatives.

    Raises:
        InvalidInputError: something else.
    """
    out = raw if pick is None else pick(raw)
    if not isinstance(out, Tensor):
        several = "[*o.values()]" if isinstance(out, Mapping) else "[*o]" if isinstance(out, tuple | list) else ""
        join = several and f", or join several, which the loss splits again: output=lambda o: torch.cat({several}, 1)"
        raise InvalidInputError(
            f"the model returns {type(out).__name__}, not a tensor; pick one with output=, for instance "
            f"output=lambda o: o.logits{join}"
        )
    if not out.is_floating_point():
        raise InvalidInputError(f"the model returns {out.dtype} outputs, which have no derivative")
    return out
