"""The cost of a layer table in floating-point operations, estimated from sizes before it starts."""

from __future__ import annotations

from bnp_analysis.curvature import gauss_newton
from bnp_analysis.diagnose.blocks import SEARCHED
from bnp_analysis.errors import WorkLimitError
from bnp_analysis.linalg.condition.factor_svd import factor_work
from bnp_analysis.linalg.condition.methods import LANCZOS_STEPS
from bnp_analysis.linalg.condition.reduction import work_to_reduce
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.spectra.entries import OFF_BLOCK_PROBES
from bnp_analysis.network import Coverage, EmpiricalRisk, Layer
from bnp_analysis.network.layers import work_of_an_example

#: Operations that a table may take unless told otherwise: five hours at `_SPEED`.
MOST_WORK = 1e15
# Of double-precision matrix products on one processor core, to say operations in hours.
_SPEED = 5e10
# A Gauss-Newton product in gradients (benchmarks/results/engines.md).
_PRODUCT = 1.5


def table_work(risk: EmpiricalRisk, layers: Coverage) -> dict[str, float]:
    """Floating-point operations of every layer's rows in a `LayerTable`: of products and of dense algebra, about.

    Args:
        risk: the empirical risk.
        layers: those wanted.

    Returns:
        Layer name -> operations.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, (x, y))
        >>> 1e3 < table_work(risk, bnp.network.coverage(risk))[""] < 1e5
        True
    """
    gradient, rows = work_of_an_example(risk, layers)
    factor = gauss_newton(risk).factor
    product = _PRODUCT * gradient * risk.batches.examples
    return {
        layer.name: _layer_work(risk, layer, rows[layer.name] * risk.batches.examples, factor, product)
        for layer in layers
    }


def off_block_is_cheap(risk: EmpiricalRisk, layers: Coverage, work: float) -> bool:
    """Whether the share outside of the layers' blocks adds little to a table: a fifth of its work, or a second.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, (x, y))
        >>> off_block_is_cheap(risk, bnp.network.coverage(risk), 0.0)
        True
    """
    gradient, _ = work_of_an_example(risk, layers)
    # Probes with the whole and with every block.
    own = OFF_BLOCK_PROBES * (1 + len(list(layers))) * _PRODUCT * gradient * risk.batches.examples
    return own <= max(work / 5, _SPEED)


def _layer_work(risk: EmpiricalRisk, layer: Layer, rows: float, factor: LinearOperator | None, product: float) -> float:
    dim = risk.space.restrict(risk.space.layer_names(layer.name)).dim
    width = layer.features + (layer.bias is not None)
    inputs = 3 * 2 * rows * layer.groups * width**2
    krylov = 2 * LANCZOS_STEPS * product  # without and with P
    inputs += 2.0 * dim**3 if dim <= SEARCHED else 0.0  # null directions, orthonormal on the coordinates they share
    if factor is None:
        return inputs + krylov + 2 * layer.units * min(width, LANCZOS_STEPS) * product
    r = factor.shape[0]
    formed, (reduce, small) = factor.dense_cost * product, work_to_reduce((r, dim))
    own = krylov if small is None else reduce + 2 * small
    # Units without and with P: of a dense layer from its inputs, else from the layer's factor.
    dense = not layer.spatial and rows == risk.batches.examples and not risk.coupled
    if dense:
        units = 2 * factor_work((int(rows), width))
        formed = 0.0
    elif small is not None:
        units = 2 * factor_work((min(r, dim), width))
    else:
        units = factor_work((r, width)) + 2 * factor_work((width, width))
    return inputs + formed + own + layer.units * units


def require_work(work: dict[str, float], limit: float) -> None:
    """Refuse a table that would take more than `limit` operations.

    Raises:
        WorkLimitError: says what it would take, which layers take most, and the ways out.
    """
    total = sum(work.values())
    if total <= limit:
        return
    dear = sorted(work, key=lambda name: -work[name])
    fits, spent = 0, 0.0
    for name in reversed(dear):
        spent += work[name]
        fits += spent <= limit
    some = f"the {fits} cheapest of its {len(work)} layers" if fits else "none of its layers"
    raise WorkLimitError(
        f"the table takes about {total:.1e} floating-point operations, {total / _SPEED / 3600:.2g} hours at "
        f"{_SPEED / 1e9:.0f} GFlop/s (one processor core); {limit:.1e} are allowed, within which {some} would be "
        f"measured. Most go into {', '.join(f'{name} ({work[name]:.1e})' for name in dear[:3])}. Name the layers "
        "wanted with layers=, take fewer examples, or raise max_flops"
    )
