"""Random numbers: local generators on the CPU, so that every device sees the same numbers, and global states.

No global generator is ever seeded; where a user's code draws from them, they come back as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.threads import LOCK

Item = TypeVar("Item")
States = tuple[Any, ...]


class Numbers(Protocol):
    """What has a dtype and a device: a tensor, an operator."""

    dtype: torch.dtype
    device: torch.device


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """A local CPU generator, another for each `stream` of a seed; the global one is never touched."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidInputError(f"seed must be an integer, got {seed!r}")
    if stream:
        state = np.random.SeedSequence((abs(seed), int(seed < 0), stream)).generate_state(1, np.uint64)
        seed = int(state[0] >> np.uint64(1))
    return torch.Generator(device="cpu").manual_seed(seed)


def normal(shape: tuple[int, ...], g: torch.Generator, like: Numbers) -> Tensor:
    """Standard normal numbers, drawn in float64 and cast: one seed means one vector in every dtype."""
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype=like.dtype, device=like.device)


def rademacher(shape: tuple[int, ...], g: torch.Generator, like: Numbers) -> Tensor:
    """Independent signs."""
    signs = torch.randint(0, 2, shape, generator=g, dtype=torch.int64) * 2 - 1
    return signs.to(dtype=like.dtype, device=like.device)


def uniform_at(seed: int, example: Tensor, entry: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), one for each pair of an example and an entry of it, whatever else is drawn.

    Args:
        seed: of all of them.
        example, entry: integers, broadcast.

    Returns:
        float64 on the CPU.

    Source: the mixing of splitmix64 (Steele, Lea and Flood 2014), once for the example and once for the entry.

    Example:
        >>> every = uniform_at(0, torch.arange(4).view(4, 1), torch.arange(3))
        >>> bool(every[2, 1] == uniform_at(0, torch.tensor(2), torch.tensor(1)))
        True
    """
    start = np.random.SeedSequence((abs(seed), int(seed < 0))).generate_state(1, np.uint64).view(np.int64)
    z = _mixed(_mixed(int(start[0]) + example.cpu().long() * _STEP) + entry.cpu().long() * _STEP)
    return (_shifted(z, 12).double() + 0.5) * 2.0**-52


_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


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
                reseed(seed, cuda)
                for g in own:
                    g.manual_seed(seed)
            yield
        finally:
            try:
                _set(before, own, cuda)
            except KeyboardInterrupt:
                _set(before, own, cuda)
                raise


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seed torch, NumPy and Python, inside `random_state`, which brings their states back.

    Example:
        >>> with random_state():
        ...     reseed(0)
        ...     first = random.random()
        ...     reseed(0)
        ...     random.random() == first
        True
    """
    # torch.manual_seed would also reseed every accelerator, for good.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


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
