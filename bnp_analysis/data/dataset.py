"""What a loaded data set is, and the two things done to its examples: choosing and standardizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set in memory: inputs, labels, and where they came from.

    Args:
        x: inputs (N, C, H, W), or (N, features) where flattened; floating point.
        y: labels (N,), int64, in `range(num_classes)`.
        name: the name it was loaded by.
        split: "train" or "test".
        classes: the name of each class.
        provenance: source files with the md5 of their decompressed bytes, `n`, `seed`, `standardize`,
            the pixel scale and the number of constant features; plain values that JSON can hold.

    Example:
        >>> data = Dataset(torch.zeros(2, 3), torch.tensor([0, 1]), "toy", "train", ("a", "b"), {})
        >>> data
        Dataset(toy, train, x (2, 3) float32, 2 classes)
        >>> len(data), data.num_classes, data.input_shape
        (2, 2, (3,))
    """

    x: Tensor
    y: Tensor
    name: str
    split: str
    classes: tuple[str, ...]
    provenance: Mapping[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The pair `(x, y)`, the form in which a risk takes its data."""
        return self.x, self.y

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, (C, H, W) or (features,)."""
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        shape = tuple(self.x.shape)
        return f"Dataset({self.name}, {self.split}, x {shape} {dtype}, {self.num_classes} classes)"


def stratified_order(y: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """A random order of the examples in which every prefix has nearly the class proportions of the whole.

    The `r`-th example of class `c` in random order has the key `(r + 1/2) / n_c`; keys are sorted, ties
    stay in random order.

    Args:
        y: labels (N,), nonnegative.
        seed: of a generator of its own; no global state is used or changed.

    Returns:
        A permutation of `range(N)`, int64. Prefixes of different lengths are nested.

    Example:
        >>> labels = np.array([0, 0, 0, 0, 1, 1])
        >>> sorted(labels[stratified_order(labels, seed=0)[:3]].tolist())
        [0, 0, 1]
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shuffled = torch.randperm(len(y), generator=generator, device="cpu").numpy()
    labels = y[shuffled]
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.empty(len(y))
    rank[by_class] = np.arange(len(y)) - np.repeat(np.cumsum(counts) - counts, counts)
    order: npt.NDArray[np.int64] = shuffled[np.argsort((rank + 0.5) / counts[labels], kind="stable")]
    return order


def pixel_statistics(
    pixels: npt.NDArray[np.uint8], rows: int = 1024
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], int]:
    """Mean and scale of every feature; the scale is the biased standard deviation, or 1 where that is 0.

    Sums and sums of squares are exact integers, so a constant feature is recognized exactly:
    `variance = (N sum x^2 - (sum x)^2) / N^2`.

    Args:
        pixels: (N, ...) uint8.
        rows: how many examples are widened to 64 bits at a time.

    Returns:
        Means and scales of shape `pixels.shape[1:]`, in pixel units, and the number of constant features.

    Example:
        >>> mean, scale, constant = pixel_statistics(np.array([[1, 5], [3, 5]], dtype=np.uint8))
        >>> mean.tolist(), scale.tolist(), constant
        ([2.0, 5.0], [1.0, 1.0], 1)
    """
    count = len(pixels)
    total = np.zeros(pixels.shape[1:], np.int64)
    square = np.zeros_like(total)
    for start in range(0, count, rows):
        block = pixels[start : start + rows].astype(np.int64)
        total += block.sum(axis=0)
        square += (block * block).sum(axis=0)
    spread = count * square - total * total
    constant = spread == 0
    scale = np.where(constant, 1.0, np.sqrt(spread) / count)
    return total / count, scale, int(constant.sum())
