"""Checks of the theory on small parts of what they take by default: the same code, a fraction of the time."""

from __future__ import annotations

import pytest

from bnp_analysis.theory.statements import conditioning, layer_curvature, rates, spectra, symmetry


@pytest.fixture(autouse=True)
def _smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer examples in dense second derivatives, fewer random starts, scalings, steps and points of an orbit."""
    monkeypatch.setattr(layer_curvature, "_MOST_OFFSETS", 100)
    monkeypatch.setattr(conditioning, "_SEARCH", 20)
    monkeypatch.setattr(rates, "_KAPPA", 130.0)
    monkeypatch.setattr(rates, "_STEPS", 8)
    monkeypatch.setattr(spectra, "_STARTS", 12)
    monkeypatch.setattr(symmetry, "TIMES", (1e-3, 1e-1, 1.0, 1e3))
    monkeypatch.setattr(symmetry, "_ROWS", 300)
