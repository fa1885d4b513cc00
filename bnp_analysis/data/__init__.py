"""Data sets of the experiments: pixels in [0, 1], checksums verified, subsets reproducible."""

from bnp_analysis.data.dataset import Dataset
from bnp_analysis.data.fetch import download
from bnp_analysis.data.loading import load, names

__all__ = ["Dataset", "download", "load", "names"]
