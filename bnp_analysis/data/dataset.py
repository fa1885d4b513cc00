"""A data set in memory, and `load`, which makes one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bnp_analysis.data.catalog import CATALOG, Catalogued
from bnp_analysis.data.files import data_root, md5_hex, parse_cifar_batch, parse_idx, read
from bnp_analysis.data.files import download as fetch
from bnp_analysis.errors import ChecksumError, InvalidInputError


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


#: The splits of every data set.
SPLITS = ("train", "test")

_DIGITS_MD5 = "7696c07daa6d85010f8268703ab8b067"
_DIGITS_TEST = 360
# Any constant would do; it is part of what "digits, test" means and must not change.
_DIGITS_SPLIT_SEED = 20220323


@dataclass(frozen=True)
class _Raw:
    """One split as stored: pixels (N, C, H, W) uint8 with values 0..top, labels, class names, sources."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    top: int
    classes: tuple[str, ...]
    source: str
    files: list[dict[str, str]]


def names() -> tuple[str, ...]:
    """The data sets that `load` knows.

    Returns:
        Their names; `digits` comes with scikit-learn, the others live in files.

    Example:
        >>> names()
        ('digits', 'mnist', 'fashion_mnist', 'cifar10')
    """
    return ("digits", *CATALOG)


def load(
    name: str,
    *,
    split: str = "train",
    n: int | None = None,
    seed: int = 0,
    standardize: bool = False,
    flatten: bool | None = None,
    dtype: torch.dtype = torch.float32,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    url: str | None = None,
) -> Dataset:
    """Load one split of a data set, pixels in [0, 1] unless `standardize` asks for `(x - mean) / std`.

    Args:
        name: "digits" (1437 + 360 images of 8 x 8, comes with scikit-learn), "mnist" or "fashion_mnist"
            (60000 + 10000 of 28 x 28), "cifar10" (50000 + 10000 of 3 x 32 x 32).
        split: "train" or "test". That of digits is fixed, random and stratified.
        n: how many examples, all in stored order by default. A subset is random and stratified: it has
            the class proportions of the split up to rounding; smaller ones of one seed are nested in larger.
        seed: of the subset. A generator of its own is used; global random state stays as it is.
        standardize: subtract the mean and divide by the standard deviation, per feature, both of the whole
            *training* split. Constant features keep scale 1 and are counted in the provenance.
        flatten: True gives x as (N, features), False as (N, C, H, W). None follows the set's published
            form: digits (N, 64), all others images.
        dtype: of x, floating point.
        data_dir: where the files are, by default the environment variable BNP_ANALYSIS_DATA.
        download: fetch missing or damaged files into the data directory first (extra `download`).
        url: base URL in place of the public mirrors.

    Returns:
        A `Dataset`, y int64.

    Raises:
        InvalidInputError: for an unknown name or split, `n` out of range, a dtype that is not floating point.
        DataNotFoundError: naming the missing files, where they were looked for, and how to get them.
        ChecksumError: if a file is not the published one; it is not parsed.

    Example:
        >>> digits = load("digits", n=100)
        >>> digits
        Dataset(digits, train, x (100, 64) float32, 10 classes)
        >>> digits.y.bincount().tolist()
        [10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
        >>> load("digits", split="test", flatten=False).x.shape
        torch.Size([360, 1, 8, 8])
    """
    _check_arguments(name, split, dtype)
    if download and name in CATALOG:
        fetch(name, data_dir=data_dir, url=url)
    root = data_root(data_dir)
    raw = _read_split(name, split, root)
    chosen = _choose(raw, name, split, n, seed)
    x = torch.from_numpy(raw.pixels[chosen]).to(dtype)
    files, constant = [dict(file) for file in raw.files], None
    if standardize:
        training = raw
        if split != "train":
            training = _read_split(name, "train", root)
            files = files + [file for file in training.files if file not in files]
        mean, scale, constant = pixel_statistics(training.pixels)
        x.sub_(torch.from_numpy(mean).to(dtype)).div_(torch.from_numpy(scale).to(dtype))
    else:
        x.div_(raw.top)
    if flatten is None:
        flatten = name == "digits"
    provenance: dict[str, Any] = {
        "source": raw.source,
        "files": files,
        "n": len(chosen),
        "available": len(raw.labels),
        "seed": None if n is None else int(seed),
        "standardize": standardize,
        "constant_features": constant,
        "pixel_scale": raw.top,
    }
    y = torch.from_numpy(raw.labels[chosen])
    return Dataset(x.flatten(1) if flatten else x, y, name, split, raw.classes, provenance)


def _check_arguments(name: str, split: str, dtype: torch.dtype) -> None:
    if name not in names():
        raise InvalidInputError(f"unknown data set {name!r}; known: {', '.join(names())}")
    if split not in SPLITS:
        raise InvalidInputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError(f"dtype must be a floating-point torch.dtype, not {dtype!r}")


def _choose(raw: _Raw, name: str, split: str, n: int | None, seed: int) -> npt.NDArray[np.int64]:
    """The indices of the examples to keep."""
    available = len(raw.labels)
    if n is None:
        return np.arange(available)
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or not 1 <= n <= available:
        raise InvalidInputError(
            f"n must be an integer in 1..{available}, the size of {name}'s {split} split, not {n!r}; n=None takes all"
        )
    return stratified_order(raw.labels, seed)[:n]


def _read_split(name: str, split: str, root: Path | None) -> _Raw:
    return _read_digits(split) if name == "digits" else _read_files(CATALOG[name], split, root)


@cache
def _read_digits(split: str) -> _Raw:
    """Parsed once in a process: scikit-learn takes a tenth of a second for what is 100 kB. `load` copies of it."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = bunch.images.astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = bunch.target.astype(np.int64)
    found = md5_hex(pixels.tobytes() + labels.astype(np.uint8).tobytes())
    if found != _DIGITS_MD5:
        raise ChecksumError(
            f"scikit-learn's digits are not the known ones: md5 {found}, expected {_DIGITS_MD5}; reinstall scikit-learn"
        )
    order = stratified_order(labels, _DIGITS_SPLIT_SEED)
    chosen = np.sort(order[:_DIGITS_TEST] if split == "test" else order[_DIGITS_TEST:])
    return _Raw(
        pixels=pixels[chosen],
        labels=labels[chosen],
        top=16,
        classes=tuple("0123456789"),
        source=f"scikit-learn {version('scikit-learn')} load_digits",
        files=[{"name": "digits", "md5": found}],
    )


def _read_files(entry: Catalogued, split: str, root: Path | None) -> _Raw:
    """Verify, then parse: nothing of a file is interpreted before its checksum agreed."""
    files: list[dict[str, str]] = []
    parsed: list[Any] = []
    for file in read(entry, split, root):
        files.append({"name": file.path.name, "md5": file.md5})
        parsed.append((parse_cifar_batch if entry.archive else parse_idx)(file.content, str(file.path)))
    if entry.archive:
        pixels, labels = (np.concatenate(parts) for parts in zip(*parsed, strict=True))
    else:
        images, targets = parsed
        _check_idx(images, targets, entry)
        pixels = images.reshape(-1, *entry.image_shape).astype(np.uint8)
        labels = targets.astype(np.int64)
    if len(pixels) != len(labels):
        raise InvalidInputError(f"{entry.name}'s {split} split: {len(pixels)} images, {len(labels)} labels")
    return _Raw(pixels, labels, 255, entry.classes, f"files of {entry.name}", files)


def _check_idx(images: npt.NDArray[np.generic], targets: npt.NDArray[np.generic], entry: Catalogued) -> None:
    size = entry.image_shape[1:]
    if images.dtype != np.uint8 or images.shape[1:] != size or images.ndim != 1 + len(size):
        raise InvalidInputError(
            f"{entry.name}'s images have shape {images.shape} and type {images.dtype}, "
            f"expected (N, {size[0]}, {size[1]}) uint8"
        )
    if targets.dtype != np.uint8 or targets.ndim != 1:
        raise InvalidInputError(
            f"{entry.name}'s labels have shape {targets.shape} and type {targets.dtype}, expected (N,) uint8"
        )
