"""Data survive strict JSON bit for bit.

Bugs that only these tests catch: NaN, infinities, -0.0 or the last bits of float16, float32, bfloat16 and
complex numbers lost on the way; a tuple that comes back as a list, an integer key as a string; data that look
like the encoding's own tags; arrays in another memory order or byte order read in the wrong one.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnp_analysis import results
from bnp_analysis.results import decode, encode, plain


def after_text(value: Any) -> Any:
    """A value after a strict JSON text."""
    text = json.dumps(encode(value, "value", lambda _: None), allow_nan=False)
    return decode(json.loads(text), lambda _: None)


def identical(a: Any, b: Any) -> bool:
    """Same type and same bits, all the way down (one NaN counts as any other)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.sampled_from(["$tuple", "$float", "type"]) | st.tuples(st.text(), st.integers())
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(trees)
def test_plain_data_comes_back_identical(tree: Any) -> None:
    assert identical(after_text(tree), tree)


FLOATS = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.nan, math.inf, -math.inf, 1 / 3]


@pytest.mark.parametrize("limit", [0, 10_000], ids=["base64", "lists"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_float_arrays_are_bit_exact(dtype: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "LIST_LIMIT", limit)
    array = np.array(FLOATS).astype(dtype).reshape(2, 4)
    if array.dtype.kind == "c":
        array.imag = array.real[::-1]
    for given_array in (array, np.asfortranarray(array), array.astype(array.dtype.newbyteorder(">"))):
        back = after_text(given_array)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back.view(f"V{array.itemsize}"), array.view(f"V{array.itemsize}"))


@pytest.mark.parametrize("limit", [0, 10_000], ids=["base64", "lists"])
@pytest.mark.parametrize("name", ["bool", "int64", "uint8", "bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_keep_dtype_shape_and_values(
    name: str, shape: tuple[int, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LIST_LIMIT", limit)
    count = math.prod(shape)
    tensor = ((torch.arange(count, dtype=torch.float64) + 1) / 3).reshape(shape).to(getattr(torch, name))
    back = after_text(tensor)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    assert plain(tensor, str) == tensor.tolist()


def test_tensors_with_gradients_and_views_are_stored_as_numbers() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    back = after_text(parameter.T)
    assert torch.equal(back, parameter.detach().T)
    assert not back.requires_grad
    conjugate = torch.complex(torch.ones(2), torch.arange(2.0)).conj()
    assert torch.equal(after_text(conjugate), conjugate)
