"""Integers that remember where they came from."""

import copy
import operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from timm_autoslim.tracing.sizes import FromAttribute, FromDimension, FromExpression, Size, leaves, wrap_attributes

OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv]


def attribute(value, path="layer.width"):
    return Size(value, FromAttribute(path))


@pytest.mark.parametrize("compute", OPERATORS, ids=lambda f: f.__name__)
@given(a=st.integers(-99, 99), b=st.integers(1, 99))
def test_arithmetic_gives_the_plain_result_and_remembers_its_operands(compute, a, b):
    left, right = attribute(a, "left"), attribute(b, "right")
    for x, y, paths in ((left, right, ["left", "right"]), (left, b, ["left"]), (a, right, ["right"])):
        result = compute(x, y)
        assert type(result) is Size
        assert int(result) == compute(a, b)
        assert isinstance(result.origin, FromExpression)
        assert [leaf.origin.path for leaf in leaves(result)] == paths


def test_expressions_nest_down_to_attributes_and_dimensions():
    vector = np.arange(6)
    dimension = Size(6, FromDimension(vector))
    found = list(leaves((attribute(8) // 2 + dimension) * 3))
    assert [int(leaf) for leaf in found] == [8, 6]
    assert found[0].origin == FromAttribute("layer.width")
    assert found[1].origin.vector is vector
    assert list(leaves(dimension)) == [dimension]


def test_what_is_not_integer_arithmetic_gives_plain_numbers():
    size = attribute(8)
    assert type(size * 0.5) is float
    assert type(0.5 * size) is float
    assert size * 0.5 == 4.0
    assert type(size**-0.5) is float
    assert type(-size) is int
    assert size == 8
    assert hash(size) == hash(8)
    assert f"{size}" == "8"


def test_copies_and_pickles_are_plain():
    for copied in (copy.deepcopy(attribute(8)), pickle.loads(pickle.dumps(attribute(8))), copy.copy(attribute(8))):
        assert type(copied) is int
        assert copied == 8


def test_wrapping_reaches_integers_alone_or_in_sequences_and_nothing_else():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.flag, self.scale, self.name = 4, True, 0.5, "layer"
            self.pair, self.parts, self.mixed, self.empty = (1, 2), [3, 4], (1, 2.0), ()
            self._hidden = 7

    model = nn.Sequential(nn.Sequential(Layer()))
    model.depth = 2
    wrap_attributes(model)
    layer = model[0][0]
    assert model.depth.origin == FromAttribute("depth")
    assert layer.width.origin == FromAttribute("0.0.width")
    assert [s.origin.path for s in layer.pair] == ["0.0.pair.0", "0.0.pair.1"]
    assert [s.origin.path for s in layer.parts] == ["0.0.parts.0", "0.0.parts.1"]
    assert type(layer.pair) is tuple
    assert type(layer.parts) is list
    assert layer.flag is True
    assert [type(v) for v in (layer.scale, layer.name, layer._hidden, layer.mixed[0])] == [float, str, int, int]
    assert layer.empty == ()


def test_torch_takes_them_as_integers():
    x = torch.arange(24.0)
    assert x.view(attribute(4), -1).shape == (4, 6)
    assert torch.equal(x[: attribute(6) // 2], x[:3])
    assert [part.numel() for part in x.split([attribute(8), attribute(16)])] == [8, 16]
