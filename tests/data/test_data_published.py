"""Catches: a checksum that is not that of the published file, and a format detail that synthetic files share
with the parser by mistake. Needs the published files: set BNP_ANALYSIS_DATA to a folder that has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bnp_analysis import data
from bnp_analysis.errors import DataNotFoundError

FOLDER = os.environ.get("BNP_ANALYSIS_DATA")
# Facts of the test splits, known apart from this package: class counts, first labels, size.
FACTS = {
    "mnist": ([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], [7, 2, 1, 0, 4, 1, 4, 9]),
    "fashion_mnist": ([1000] * 10, [9, 2, 1, 1, 6, 1, 4, 6]),
    "cifar10": ([1000] * 10, [3, 8, 8, 0, 6, 6, 1, 6]),
}


@pytest.mark.skipif(not FOLDER, reason="BNP_ANALYSIS_DATA is not set: no published files to read")
@pytest.mark.parametrize("name", FACTS)
def test_published_test_split(name: str) -> None:
    assert FOLDER is not None
    try:
        loaded = data.load(name, split="test", data_dir=Path(FOLDER))
    except DataNotFoundError:
        pytest.skip(f"{name} is not in BNP_ANALYSIS_DATA")
    counts, first = FACTS[name]
    assert loaded.y.bincount().tolist() == counts
    assert loaded.y[:8].tolist() == first
    assert (loaded.x.min().item(), loaded.x.max().item()) == (0.0, 1.0)


@pytest.mark.skipif(not FOLDER, reason="BNP_ANALYSIS_DATA is not set: no published files to read")
def test_published_mnist_statistics() -> None:
    """The mean .1307 and deviation .3081 that everybody standardizes with; 67 pixels are always 0."""
    assert FOLDER is not None
    try:
        x = data.load("mnist", data_dir=Path(FOLDER)).x
    except DataNotFoundError:
        pytest.skip("mnist is not in BNP_ANALYSIS_DATA")
    assert round(x.mean().item(), 4) == 0.1307
    assert round(x.std().item(), 4) == 0.3081
    assert int((x.amax((0, 1)) == 0).sum()) == 67
