"""Global random states, kept as the caller left them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

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
