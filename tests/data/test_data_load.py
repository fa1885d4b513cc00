"""Catches: pixels off the scale, test statistics used to standardize, an inexact test for constant features,
subsets that depend on or disturb the global random state, inputs and labels out of step, and arguments that
are not checked."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from bnp_analysis import data
from bnp_analysis.data.dataset import _read_digits, pixel_statistics, stratified_order
from bnp_analysis.errors import ChecksumError, InvalidInputError

# digits


def test_digits_splits_are_a_stratified_partition() -> None:
    from sklearn.datasets import load_digits

    train, test = data.load("digits"), data.load("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    together = torch.cat([train.x, test.x]).numpy()
    original = (load_digits().data / 16).astype(np.float32)
    assert sorted(map(tuple, together)) == sorted(map(tuple, original))
    share = test.y.bincount() / (train.y.bincount() + test.y.bincount())
    assert (share - 360 / 1797).abs().max() < 0.006  # rounding of 36 in 180


def test_digits_split_is_the_documented_constant() -> None:
    """The split is part of every published number: a change must be seen."""
    test = data.load("digits", split="test")
    assert test.y[:12].tolist() == [2, 6, 8, 3, 8, 6, 0, 8, 4, 7, 3, 1]
    assert int((test.x[0] * 16).sum()) == 344


def test_digits_are_flat_unless_images_are_asked_for() -> None:
    flat, images = data.load("digits", n=5), data.load("digits", n=5, flatten=False)
    assert images.x.shape == (5, 1, 8, 8)
    assert torch.equal(images.x.flatten(1), flat.x)
    assert (flat.input_shape, images.input_shape) == ((64,), (1, 8, 8))


def test_changed_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    bunch.images[0, 0, 0] += 1
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bunch)
    _read_digits.cache_clear()
    with pytest.raises(ChecksumError, match="digits are not the known ones"):
        data.load("digits")


# scale, dtype, standardizing


def test_pixels_are_in_the_unit_interval_and_attain_it() -> None:
    x = data.load("digits").x
    assert (x.min().item(), x.max().item()) == (0.0, 1.0)
    assert x.dtype == torch.float32


def test_dtype_is_the_exact_quotient() -> None:
    double = data.load("digits", n=50, dtype=torch.float64)
    assert double.x.dtype == torch.float64
    assert torch.equal((double.x * 16).round() / 16, double.x)


@pytest.mark.parametrize("split", ["train", "test"])
def test_standardizing_uses_the_whole_training_split(split: str) -> None:
    train = data.load("digits", dtype=torch.float64).x
    std = train.std(0, correction=0)
    constant = std == 0
    std[constant] = 1
    raw = data.load("digits", split=split, n=100, dtype=torch.float64).x
    done = data.load("digits", split=split, n=100, dtype=torch.float64, standardize=True)
    expected = (raw - train.mean(0)) / std
    # A constant feature keeps the pixel scale: 0 in the training split, so only its shift matters there.
    torch.testing.assert_close(done.x[:, ~constant], expected[:, ~constant], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(done.x[:, constant], 16 * expected[:, constant], rtol=1e-12, atol=1e-12)
    assert done.provenance["constant_features"] == int(constant.sum()) == 3


def test_standardized_training_split_has_mean_0_and_variance_0_or_1() -> None:
    x = data.load("digits", standardize=True, dtype=torch.float64).x
    assert x.mean(0).abs().max() < 1e-12
    variance = x.var(0, correction=0)
    assert variance[variance < 0.5].tolist() == [0.0, 0.0, 0.0]
    assert (variance[variance > 0.5] - 1).abs().max() < 1e-12


def test_statistics_recognize_constants_exactly() -> None:
    """Rounded sums make a constant look varying, or a single deviation constant; 32 bits overflow here."""
    pixels = np.full((40001, 3), 255, np.uint8)
    pixels[1, 1] = 254
    pixels[::2, 2] = 0
    mean, scale, constant = pixel_statistics(pixels, rows=999)
    assert constant == 1
    np.testing.assert_allclose(mean, pixels.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale[0], 1.0)
    np.testing.assert_allclose(scale[1:], pixels[:, 1:].astype(float).std(0), rtol=1e-9)


# subsets


def test_subsets_keep_the_class_proportions_and_are_nested() -> None:
    labels = np.repeat(np.arange(4), [400, 300, 200, 100])
    order = stratified_order(labels, seed=5)
    assert sorted(order) == list(range(1000))
    for n in (1, 7, 10, 99, 500, 1000):
        counts = np.bincount(labels[order[:n]], minlength=4)
        assert np.abs(counts - n * np.array([0.4, 0.3, 0.2, 0.1])).max() <= 1
    small, large = data.load("digits", n=30, seed=2), data.load("digits", n=90, seed=2)
    assert torch.equal(small.x, large.x[:30])


def test_subsets_are_random_within_a_class_and_among_classes() -> None:
    labels = np.repeat(np.arange(10), 50)
    orders = [stratified_order(labels, seed) for seed in range(20)]
    assert len({int(order[0]) for order in orders}) > 10
    assert len({int(labels[order[0]]) for order in orders}) > 4


def test_subsets_depend_on_the_seed_alone_and_leave_global_random_state() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    python_state = random.getstate()
    first = data.load("digits", n=20, seed=1)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert python_state == random.getstate()
    torch.rand(3)
    again, other = data.load("digits", n=20, seed=1), data.load("digits", n=20, seed=2)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)


def test_a_default_device_does_not_matter() -> None:
    expected = data.load("digits", n=20, seed=1, standardize=True)
    with torch.device("meta"):
        loaded = data.load("digits", n=20, seed=1, standardize=True)
    assert torch.equal(loaded.x, expected.x)


def test_inputs_and_labels_stay_together() -> None:
    whole, part = data.load("digits"), data.load("digits", n=200)
    label_of = {tuple(x): int(y) for x, y in zip(whole.x.tolist(), whole.y, strict=True)}
    assert [label_of[tuple(x)] for x in part.x.tolist()] == part.y.tolist()


@pytest.mark.parametrize("n", [0, -1, 1438, 2.0, True, "5"])
def test_bad_n_is_refused(n: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"1\.\.1437.*train split"):
        data.load("digits", n=n)


def test_numpy_integers_are_integers() -> None:
    loaded = data.load("digits", n=np.int64(3))  # type: ignore[arg-type]
    assert json.dumps(loaded.provenance)
    assert len(loaded) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "known: digits, mnist, fashion_mnist, cifar10"),
        ({"name": "digits", "split": "validation"}, "known: train, test"),
        ({"name": "digits", "dtype": torch.int64}, "floating-point"),
        ({"name": "digits", "dtype": "float32"}, "floating-point"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        data.load(**arguments)


# the result


def test_result_is_frozen_and_its_provenance_is_json() -> None:
    loaded = data.load("digits", n=10, seed=4, standardize=True)
    with pytest.raises(AttributeError):
        loaded.name = "other"  # type: ignore[misc]
    assert loaded.tensors[0] is loaded.x
    assert loaded.tensors[1] is loaded.y
    assert loaded.y.dtype == torch.int64
    assert loaded.num_classes == len(loaded.classes) == 10
    kept = json.loads(json.dumps(loaded.provenance))
    assert (kept["n"], kept["available"], kept["seed"], kept["standardize"]) == (10, 1437, 4, True)
    assert len(kept["files"][0]["md5"]) == 32
    assert "bytes" not in repr(loaded)


def test_loaded_tensors_are_writable_and_independent() -> None:
    first = data.load("digits", n=3)
    first.x.zero_()
    assert data.load("digits", n=3).x.any()
