"""Global random states, kept as the caller left them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state(
    *, seed: int | None = None, device: torch.device | None = None, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """The states of torch, NumPy and Python, and of `generators`, come back afterwards; `seed` sets them meanwhile.

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
    own = [(g, g.get_state()) for g in generators]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002
    cuda = device if device is not None and device.type == "cuda" else None
    on_device = None if cuda is None else torch.cuda.get_rng_state(cuda)
    try:
        if seed is not None:
            # torch.manual_seed would also reseed every accelerator, for good.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            for g, _ in own:
                g.manual_seed(seed)
            if cuda is not None:
                with torch.cuda.device(cuda):
                    torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        for g, state in own:
            g.set_state(state)
        if cuda is not None and on_device is not None:
            torch.cuda.set_rng_state(on_device, cuda)
