"""Symmetries of a network: what may move in its tensors and parameters together without a change of its outputs."""
