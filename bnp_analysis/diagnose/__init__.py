"""High-level measurements and reports, composed of the other subpackages; no new mathematics."""

from bnp_analysis.diagnose.conditioning import Conditioning, condition
from bnp_analysis.diagnose.preconditioners import PreconditionerReport, preconditioner_report
from bnp_analysis.diagnose.price import MOST_WORK
from bnp_analysis.diagnose.slices import (
    DirectionalSharpness,
    EigenvectorMass,
    Slice,
    directional_sharpness,
    eigenvector_mass,
    slice,
)
from bnp_analysis.diagnose.spectra import BlockSpectra, block_spectra
from bnp_analysis.diagnose.tables import LEGEND, Comparison, LayerRow, LayerTable, cell, spread
from bnp_analysis.diagnose.verbs import compare, curvature_matrix, layer_table

__all__ = [
    "LEGEND",
    "MOST_WORK",
    "BlockSpectra",
    "Comparison",
    "Conditioning",
    "DirectionalSharpness",
    "EigenvectorMass",
    "LayerRow",
    "LayerTable",
    "PreconditionerReport",
    "Slice",
    "block_spectra",
    "cell",
    "compare",
    "condition",
    "curvature_matrix",
    "directional_sharpness",
    "eigenvector_mass",
    "layer_table",
    "preconditioner_report",
    "slice",
    "spread",
]
