"""Random draws at the ends of their range, which tell whether a model's output depends on any."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnp_analysis.runtime.random import random_state

# Words of a generator's state that are chosen; the others are random, so that loops which reject draws come to an end.
_CHOSEN, _WORDS = 480, 624


@contextmanager
def extreme_draws(which: int, device: torch.device | None = None) -> Iterator[None]:
    """Meanwhile the global generators draw their smallest numbers (`which` 0), their largest (1) or a mixture (2, ...).

    A decision `draw < p` falls both ways, however small `p` is: for Python, NumPy and torch on the CPU, whose
    generators are Mersenne twisters with a state that can be chosen. On the first 480 words (240 numbers in float64).

    Example:
        >>> import random
        >>> with extreme_draws(0):
        ...     random.random() < 1e-12
        True
    """
    own = np.random.RandomState(which)
    words = own.randint(0, 2**32, _WORDS, dtype=np.uint64)
    ends = np.array([0, 2**32 - 1], dtype=np.uint64)
    pick = np.full(_CHOSEN, which) if which < 2 else own.randint(0, 3, _CHOSEN)
    words[:_CHOSEN] = np.where(pick < 2, ends[np.minimum(pick, 1)], words[:_CHOSEN])
    state = _untempered(words)
    with random_state(seed=which, device=device), _Bernoulli(which):
        random.setstate((3, (*(int(w) for w in state), 0), None))
        np.random.set_state(("MT19937", state.astype(np.uint32), 0, 0, 0.0))  # noqa: NPY002
        torch.set_rng_state(_torch_state(state))
        yield


def _untempered(y: np.ndarray) -> np.ndarray:
    """The state words from which a Mersenne twister makes these numbers."""
    y = y ^ (y >> np.uint64(18))
    y = y ^ ((y << np.uint64(15)) & np.uint64(0xEFC60000))
    x = y
    for _ in range(4):
        x = y ^ ((x << np.uint64(7)) & np.uint64(0x9D2C5680))
    y = x
    for _ in range(2):
        x = y ^ (x >> np.uint64(11))
    return x & np.uint64(0xFFFFFFFF)


def _torch_state(words: np.ndarray) -> Tensor:
    """A state of torch's generator: seed, numbers left, seeded, next, the words, normal numbers kept for later."""
    state = torch.Generator().manual_seed(0).get_state().numpy()
    state[8:12].view(np.int32)[0] = _WORDS
    state[16:24].view(np.uint64)[0] = 0
    state[24 : 24 + 8 * _WORDS].view(np.uint64)[:] = words
    return torch.from_numpy(state)


class _Bernoulli(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Masks of dropout, drawn by other generators than the states above, at one of their two ends."""

    def __init__(self, which: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._which = which

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would load its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._which < 2 and func.overloadpacket is torch.ops.aten.bernoulli_ and len(args) > 1:
            p = args[1]
            out.copy_(torch.as_tensor(p > 0 if self._which else p >= 1))
        return out
