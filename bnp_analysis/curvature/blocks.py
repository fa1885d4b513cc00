"""Diagonal blocks of a curvature matrix: a layer by itself, a unit inside its layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bnp_analysis.linalg.derived import Restriction
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk


def restricted(
    risk: EmpiricalRisk, block: Block | None, build: Callable[[EmpiricalRisk], SymmetricOperator]
) -> SymmetricOperator:
    """`build(risk)`, or its diagonal block; only the block's tensors are differentiated."""
    if block is None:
        return build(risk)
    layer = block if isinstance(block, str) else block[0]
    inner = risk.restrict(risk.space.layer_names(layer))
    operator = build(inner)
    if isinstance(block, str):
        return operator
    return Restriction(operator, block_positions(risk, block))


def block_positions(risk: EmpiricalRisk, block: Block) -> torch.Tensor:
    """Positions of a block inside its own layer's flat vector."""
    layer = block if isinstance(block, str) else block[0]
    return risk.space.restrict(risk.space.layer_names(layer)).indices(block)
