"""Preconditioners of networks: BNP, and diagonal and Kronecker-factored ones for comparison."""

from typing import NoReturn

from bnp_analysis.precondition.base import (
    BlockDiagonal,
    NetworkPreconditioner,
    identity_preconditioner,
)
from bnp_analysis.precondition.bnp import BNPBlock, BNPPreconditioner, bnp_preconditioner, layer_block
from bnp_analysis.precondition.diagonal import DiagonalPreconditioner, diagonal_preconditioner
from bnp_analysis.precondition.from_optimizer import KroneckerRoots, LBFGSBlock, optimizer_preconditioner
from bnp_analysis.precondition.kronecker import KroneckerBlock, KroneckerPreconditioner, kfac_preconditioner

__all__ = [
    "BNPBlock",
    "BNPPreconditioner",
    "BlockDiagonal",
    "DiagonalPreconditioner",
    "KroneckerBlock",
    "KroneckerPreconditioner",
    "KroneckerRoots",
    "LBFGSBlock",
    "NetworkPreconditioner",
    "bnp_preconditioner",
    "diagonal_preconditioner",
    "identity_preconditioner",
    "kfac_preconditioner",
    "layer_block",
    "optimizer_preconditioner",
]


def __getattr__(name: str) -> NoReturn:
    gone = ": P.part(positions) does what it asked for" if name == "SplitsByUnit" else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{gone}")
