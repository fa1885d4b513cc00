"""Global random states, kept as the caller left them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnp_analysis.network.kernels import LOCK

Item = TypeVar("Item")
States = tuple[Any, ...]


@contextmanager
def random_state(
    *, seed: int | None = None, device: torch.device | None = None, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """The states of torch, NumPy and Python, and of `generators`, come back afterwards; `seed` sets them meanwhile.

    Other threads wait for their turn.

    Args:
        seed: of all of them; None leaves them as they are.
        device: an accelerator whose state is kept and seeded too.
        generators: of a loader.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with random_state(seed=0):
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    own = list(generators)
    cuda = device if device is not None and device.type == "cuda" else None
    with LOCK:
        before = _states(own, cuda)
        try:
            if seed is not None:
                # torch.manual_seed would also reseed every accelerator, for good.
                torch.default_generator.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                for g in own:
                    g.manual_seed(seed)
                if cuda is not None:
                    with torch.cuda.device(cuda):
                        torch.cuda.manual_seed(seed)
            yield
        finally:
            try:
                _set(before, own, cuda)
            except KeyboardInterrupt:
                _set(before, own, cuda)
                raise


def apart(items: Iterable[Item], *, seed: int | None, generators: Iterable[torch.Generator]) -> Iterator[Item]:
    """The items, each made under random states that only they use, begun as `random_state` would.

    Between two of them the caller has its own states, and other threads theirs.
    """
    own = list(generators)
    states: States | None = None
    source: Iterator[Item] | None = None
    while True:
        with random_state(seed=seed if source is None else None, generators=own):
            if states is not None:
                _set(states, own, None)
            source = iter(items) if source is None else source
            found = list(islice(source, 1))
            states = _states(own, None)
        if not found:
            return
        yield found[0]


def _states(generators: list[torch.Generator], cuda: torch.device | None) -> States:
    return (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
        [g.get_state() for g in generators],
        None if cuda is None else torch.cuda.get_rng_state(cuda),
    )


def _set(states: States, generators: list[torch.Generator], cuda: torch.device | None) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    for g, state in zip(generators, states[3], strict=True):
        g.set_state(state)
    if cuda is not None:
        torch.cuda.set_rng_state(states[4], cuda)


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
