"""Data sets of the experiments: pixels in [0, 1], checksums verified, subsets reproducible."""

from bnp_analysis.data.dataset import Dataset, load, names
from bnp_analysis.data.files import download

__all__ = ["Dataset", "download", "load", "names"]
