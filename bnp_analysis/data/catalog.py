"""Names, checksums, addresses and mirrors of the files of each data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bnp_analysis.errors import InvalidInputError


@dataclass(frozen=True)
class SourceFile:
    """One published file: its name without compression suffix, the md5 of its decompressed bytes, and their number.

    Without the number (None) there is no limit to what is decompressed.
    """

    name: str
    md5: str
    size: int | None = None


@dataclass(frozen=True)
class Catalogued:
    """One data set that lives in files.

    `image_shape` is (C, H, W); `files` maps a split to its files in reading order; `folders` are the
    sub-folders of a data directory that are searched, the first being where downloads go; `mirrors` are
    base URLs; `archive` is the tar file that holds `archive_folder`/<file>, or None where each file is
    published alone, as <file>.gz.
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    files: Mapping[str, tuple[SourceFile, ...]]
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    archive: str | None = None
    archive_folder: str = ""
    hint: str = ""

    @property
    def all_files(self) -> tuple[SourceFile, ...]:
        """Every file of every split."""
        return tuple(file for files in self.files.values() for file in files)


def _idx_files(md5: Mapping[str, str]) -> dict[str, tuple[SourceFile, ...]]:
    """The images and the labels of both splits, in the naming of the MNIST family."""
    prefixes = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
    kinds = {"images-idx3-ubyte": (16, 28 * 28), "labels-idx1-ubyte": (8, 1)}  # bytes of the header, of an example
    return {
        split: tuple(
            SourceFile(f"{prefix}-{kind}", md5[f"{prefix}-{kind}"], head + count * each)
            for kind, (head, each) in kinds.items()
        )
        for split, (prefix, count) in prefixes.items()
    }


_MNIST = Catalogued(
    name="mnist",
    image_shape=(1, 28, 28),
    classes=tuple("0123456789"),
    files=_idx_files(
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        }
    ),
    folders=("mnist", "MNIST", "MNIST/raw", "."),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)

_FASHION_MNIST = Catalogued(
    name="fashion_mnist",
    image_shape=(1, 28, 28),
    classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    files=_idx_files(
        {
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        }
    ),
    folders=("fashion_mnist", "fashion-mnist", "FashionMNIST", "FashionMNIST/raw", "."),
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    hint="on Debian and Ubuntu: apt-get install dataset-fashion-mnist, "
    "then data_dir='/usr/share/datasets/fashion-mnist'",
)

_CIFAR10 = Catalogued(
    name="cifar10",
    image_shape=(3, 32, 32),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    files={
        "train": (
            SourceFile("data_batch_1", "c99cafc152244af753f735de768cd75f", 31_035_704),
            SourceFile("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec", 31_035_320),
            SourceFile("data_batch_3", "54ebc095f3ab1f0389bbae665268c751", 31_035_999),
            SourceFile("data_batch_4", "634d18415352ddfa80567beed471001a", 31_035_696),
            SourceFile("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb", 31_035_623),
        ),
        "test": (SourceFile("test_batch", "40351d587109b95175f43aff81a1287e", 31_035_526),),
    },
    folders=("cifar-10-batches-py", "cifar10", "cifar10/cifar-10-batches-py", "."),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    archive="cifar-10-python.tar.gz",
    archive_folder="cifar-10-batches-py",
    hint="unpack cifar-10-python.tar.gz into the data directory",
)

#: The data sets that live in files, by name. `digits` is not here: it comes with scikit-learn.
CATALOG: dict[str, Catalogued] = {entry.name: entry for entry in (_MNIST, _FASHION_MNIST, _CIFAR10)}


def catalogued(name: str) -> Catalogued:
    """Look a file-based data set up by name.

    Args:
        name: a key of `CATALOG`.

    Returns:
        Its entry.

    Raises:
        InvalidInputError: for a name that is not catalogued.

    Example:
        >>> catalogued("cifar10").image_shape
        (3, 32, 32)
    """
    if name not in CATALOG:
        raise InvalidInputError(f"no data set {name!r} lives in files; those that do: {', '.join(CATALOG)}")
    return CATALOG[name]


def whose(md5: str) -> str | None:
    """The data set and file with this checksum, in words, or None."""
    found = (f"{entry.name}'s {file.name}" for entry in CATALOG.values() for file in entry.all_files if file.md5 == md5)
    return next(found, None)
