"""Condition numbers: the verbs, the methods they choose among, and what may be claimed."""

# Each of these registers its method.
from bnp_analysis.linalg.condition import (  # noqa: F401
    dense,
    factor_svd,
    golub_kahan,
    inverse_lanczos,
    lanczos,
    row_gram,
)
