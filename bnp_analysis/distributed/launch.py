"""How processes find each other."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from bnp_analysis.distributed.group import ALONE, Group
from bnp_analysis.distributed.link import Link
from bnp_analysis.errors import DistributedError, InvalidInputError
from bnp_analysis.runtime.kinds import gated

# Starting takes processes longer, and differs more among them, than what they do together.
_START = 300.0


def launched() -> int:
    """How many processes the launcher (`torchrun`) says there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@gated
def initialize(*, timeout: float = 600.0) -> Group:
    """The group of the processes that `torchrun` started, or that `torch.distributed` already connects.

    Tensors on the CPU are summed by gloo, those on GPUs by nccl, one GPU per process of a machine.

    Args:
        timeout: seconds that a process may be late before the others end with an error: more than what one product
            on the largest shard takes, and than what one process may do alone. For the start at least 300.

    Returns:
        A `Group`; of this process alone where nothing was launched.

    Raises:
        DistributedError: processes that do not come, or a torch without `torch.distributed`.

    Example:
        >>> import bnp_analysis as bnp
        >>> group = bnp.distributed.initialize()
        >>> group.rank, group.size, group.shard(list("abc"))
        (0, 1, ['a', 'b', 'c'])
    """
    if not timeout > 0:
        raise InvalidInputError(f"timeout must be a positive number of seconds, got {timeout}")
    if not dist.is_available() or not dist.is_gloo_available():
        if launched() > 1:
            raise DistributedError(
                f"{launched()} processes were launched, but this torch ({torch.__version__}) is built without "
                "torch.distributed and gloo, so each would measure alone. Install a build that has them, or start one "
                "process"
            )
        return ALONE
    own = not dist.is_initialized()
    if own:
        if launched() == 1:
            return ALONE
        backend = "gloo"
        if torch.cuda.is_available() and dist.is_nccl_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=max(timeout, _START)))
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"the {launched()} processes did not find each other in time ({error}). Start all of "
                "them, with one MASTER_ADDR and MASTER_PORT, or let torchrun do it"
            ) from error
    return ALONE if dist.get_world_size() == 1 else Group(Link(timeout, owns=own))
