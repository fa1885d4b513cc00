"""Catches: a chart whose slices overlap, lose entries or follow another order than row-major `named_parameters()`, and
blocks of layers or units that take in a neighbour with a similar name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from network_models import numbers
from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import ParameterSpace

SHAPES = st.dictionaries(
    st.from_regex(r"[a-c]{1,2}(\.[wb])?", fullmatch=True),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)


@given(SHAPES)
def test_flatten_and_unflatten_are_inverse(shapes: dict[str, tuple[int, ...]]) -> None:
    space = ParameterSpace(shapes, torch.float64)
    theta = numbers(space.dim)
    tensors = space.unflatten(theta)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == shapes
    assert torch.equal(space.flatten(tensors), theta)
    assert torch.equal(space.flatten(tensors.values()), theta)
    assert torch.equal(space.flatten(dict(reversed(tensors.items()))), theta)  # by name, not by place
    positions = torch.cat([torch.arange(space.dim)[space.slice_of(n)] for n in space.names])
    assert positions.tolist() == list(range(space.dim))


def test_the_order_is_torchs() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    space = ParameterSpace({n: p.shape for n, p in model.named_parameters()})
    expected = nn.utils.parameters_to_vector(model.parameters())
    assert torch.equal(space.flatten(dict(model.named_parameters())), expected)


def test_unflattened_tensors_are_views() -> None:
    space = ParameterSpace({"a": (2, 3), "b": (2,)}, torch.float64)
    theta = numbers(8)
    space.unflatten(theta)["b"].zero_()
    assert theta[6:].tolist() == [0, 0]


SPACE = ParameterSpace(
    {"fc1.weight": (2, 3), "fc1.bias": (2,), "fc10.weight": (2, 2), "block.fc1.weight": (1, 2), "scale": ()},
    aliases={"head.weight": "fc10.weight", "elsewhere": "not here"},
)


@pytest.mark.parametrize(
    ("block", "positions"),
    [
        ("fc1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("fc1.bias", [6, 7]),
        (("fc1", 1), [3, 4, 5, 7]),
        (("fc1.weight", 0), [0, 1, 2]),
        ("fc10", [8, 9, 10, 11]),
        ("block", [12, 13]),
        ("block.fc1", [12, 13]),
        ("head", [8, 9, 10, 11]),
        (("head.weight", 1), [10, 11]),
        ("scale", [14]),
        ("", list(range(15))),
    ],
)
def test_positions_of_blocks(block: str | tuple[str, int], positions: list[int]) -> None:
    assert SPACE.indices(block).tolist() == positions


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ("fc", "no parameter belongs to 'fc'; there are: fc1.weight"),
        ("elsewhere", "no parameter belongs"),
        (("fc1", 2), r"no output unit 2: its parameter 'fc1.weight' has shape \(2, 3\)"),
        (("fc1", -1), "no output unit -1"),
        (("scale", 0), r"'scale' has shape \(\)"),
        (("", 1), "block.fc1.weight"),
        (3, r"^block must be the name of a layer, or \(name, unit\), not 3$"),
        (("fc1", 0.5), r"block must be the name of a layer, or \(name, unit\), not \('fc1', 0\.5\)"),
    ],
)
def test_blocks_that_do_not_exist(block: str | tuple[str, int], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        SPACE.indices(block)


def test_aliases() -> None:
    assert "head.weight" in SPACE
    assert "elsewhere" not in SPACE
    assert SPACE.canonical("head.weight") == "fc10.weight"
    assert SPACE.slice_of("head.weight") == SPACE.slice_of("fc10.weight")
    with pytest.raises(InvalidInputError, match="no parameter 'elsewhere' here"):
        SPACE.canonical("elsewhere")


def test_restriction_keeps_order_dtype_and_aliases() -> None:
    part = SPACE.restrict(["head.weight", "fc1.bias"])
    assert part.names == ("fc1.bias", "fc10.weight")
    assert part.canonical("head.weight") == "fc10.weight"
    assert "head.weight" not in SPACE.restrict(["fc1.bias"])
    assert (part.dtype, part.device) == (SPACE.dtype, SPACE.device)


def test_tensors_that_do_not_fit() -> None:
    space = ParameterSpace({"a": (2, 3), "b": (2,)})
    with pytest.raises(InvalidInputError, match="tensors are missing: b"):
        space.flatten({"a": torch.zeros(2, 3)})
    with pytest.raises(InvalidInputError, match=r"a has shape \(3, 2\), expected \(2, 3\)"):
        space.flatten({"a": torch.zeros(3, 2), "b": torch.zeros(2)})
    with pytest.raises(InvalidInputError, match="2 tensors are needed, for a, b"):
        space.flatten([torch.zeros(2, 3)])
    with pytest.raises(InvalidInputError, match=r"shape \(8,\) is needed, got \(8, 1\)"):
        space.unflatten(torch.zeros(8, 1))
    assert repr(space) == "<ParameterSpace 8 in 2 tensors, torch.float32 on cpu>"


def test_patterns_and_ranges_of_units_are_blocks() -> None:
    """Two oracles: `fnmatch` on the names, and the rows of the tensors themselves."""
    assert SPACE.layer_names("*.weight") == ("fc1.weight", "fc10.weight", "block.fc1.weight")
    assert SPACE.layer_names("*.fc1") == ("block.fc1.weight",)  # modules above a name
    assert SPACE.layer_names("head.*") == ("fc10.weight",)  # tied
    assert SPACE.layer_names("fc[0-9].*") == ("fc1.weight", "fc1.bias")
    with pytest.raises(InvalidInputError, match=r"fc1\.weight"):
        SPACE.layer_names("*.nothing")
    packed = ParameterSpace({"a.w": (6, 2), "a.b": (6,), "t": (2, 6)}, transposed={"t": 1})
    tensors = packed.unflatten(torch.arange(packed.dim))
    parts = packed.row_blocks("a", "qkv") | packed.row_blocks("t", 3)
    assert list(parts) == ["a[q]", "a[k]", "a[v]", "t[0]", "t[1]", "t[2]"]
    assert packed.indices(parts["a[k]"]).tolist() == [*tensors["a.w"][2:4].flatten(), *tensors["a.b"][2:4]]
    assert packed.indices(parts["t[2]"]).tolist() == tensors["t"][:, 4:].T.flatten().tolist()
    assert packed.indices(("a", slice(1, 2))).tolist() == packed.indices(("a", 1)).tolist()
    for wrong in (slice(4, 7), slice(2, 2), slice(-1, 2), slice(None, 2), slice(0, 4, 2)):
        with pytest.raises(InvalidInputError, match=r"output unit|range of output units"):
            packed.indices(("a", wrong))
    for parts_wanted in (4, [], 0):
        with pytest.raises(InvalidInputError, match="divide"):
            packed.row_blocks("a", parts_wanted)
    with pytest.raises(InvalidInputError, match="'scale' have 0 rows, which do not divide into 1 equal parts"):
        SPACE.row_blocks("scale", 1)
