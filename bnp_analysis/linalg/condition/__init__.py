"""Condition numbers: the public functions, the methods they choose from, and certificates."""

# Each of these registers its method.
from bnp_analysis.linalg.condition import (  # noqa: F401
    dense,
    factor_svd,
    golub_kahan,
    inverse_lanczos,
    lanczos,
    row_gram,
)
