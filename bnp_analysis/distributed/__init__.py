"""Several processes: each holds a shard of the data, sums over batches end with a sum over processes.

    group = bnp.distributed.initialize()  # under torchrun; one process without it
    risk = bnp.EmpiricalRisk(model, loss, group.shard((x, y)), group=group)

Everything else is written as for one process and run by all of them: parameters, Krylov vectors and results are the
same numbers everywhere.
"""

from bnp_analysis.distributed.group import ALONE, Group, initialize, launched, over_processes

__all__ = ["ALONE", "Group", "initialize", "launched", "over_processes"]
