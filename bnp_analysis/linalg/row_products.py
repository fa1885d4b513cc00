"""Factors whose rows are Kronecker products, `g (x) h`: products of rows by Hadamard products of small ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowProducts:
    """Rows `g_jr (x) h_j` of a factor, in some of its columns: those of one dense layer (T1).

    Products of two rows are `(g_jr . g_ks) (h_j . h_k)`: the Gram matrix of all rows costs what its size is, however
    many columns there are.

    Attributes:
        left: `G`, `(R, r, n)`, example by example.
        right: `H`, `(R, f)`, with the bias column last if there is one.
        columns: `(n f,)`, positions of the columns: unit after unit, then those of the biases.
    """

    left: Tensor
    right: Tensor
    columns: Tensor
