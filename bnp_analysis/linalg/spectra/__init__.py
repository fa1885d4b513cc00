"""Eigenpairs, densities, traces and diagonals of symmetric operators."""
