"""Preconditioners of networks: BNP and what it is compared with."""

from bnp_analysis.precondition.blocks import BlockDiagonal, identity_preconditioner
from bnp_analysis.precondition.bnp import BNPBlock, BNPPreconditioner, bnp_preconditioner

__all__ = ["BNPBlock", "BNPPreconditioner", "BlockDiagonal", "bnp_preconditioner", "identity_preconditioner"]
