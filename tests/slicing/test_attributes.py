"""Attributes set by path, in modules and in containers of every kind, and put back."""

import pytest
from helpers.comparisons import assert_same, snapshot
from helpers.tied import SLICED_ATTRIBUTES, TIED_SLICES, Tied
from torch import nn

from timm_autoslim.slicing.attributes import restore_attributes, set_attributes


def test_attributes_are_set_in_modules_lists_tuples_and_dicts():
    model = nn.Sequential(Tied())
    before = snapshot(model)
    changes = set_attributes(model, {f"0.{path}": value for path, value in TIED_SLICES.attributes.items()})
    assert {name: vars(model[0])[name] for name in SLICED_ATTRIBUTES} == SLICED_ATTRIBUTES
    assert model[0].first.in_features == 3
    restore_attributes(changes)
    assert_same(before, snapshot(model))
    assert model[0].shape == (6, 2)
    assert model[0].info == [{"num_chs": 6, "sizes": (1, 6)}]


def test_a_list_that_a_configuration_shares_stays_as_it_is():
    model, config = nn.Linear(2, 2), [192, 384]
    model.embed_dim = config
    changes = set_attributes(model, {"embed_dim.1": 100, "embed_dim.0": 50})
    assert model.embed_dim == [50, 100]
    assert config == [192, 384]
    restore_attributes(changes)
    assert model.embed_dim is config


def test_members_of_one_tuple_are_set_one_after_the_other():
    model = Tied()
    changes = set_attributes(model, {"shape.0": 3, "shape.1": 1, "info.0.sizes.0": 4, "info.0.sizes.1": 5})
    assert (model.shape, model.info[0]["sizes"]) == ((3, 1), (4, 5))
    restore_attributes(changes)
    assert (model.shape, model.info[0]["sizes"]) == ((6, 2), (1, 6))


@pytest.mark.parametrize(("path", "error"), [("height", KeyError), ("shape.2", IndexError), ("parts.2", IndexError)])
def test_a_missing_attribute_is_not_created_and_the_others_stay(path, error):
    model = Tied()
    before = snapshot(model)
    with pytest.raises(error):
        set_attributes(model, {"width": 3, "shape.0": 3, path: 3})
    assert_same(before, snapshot(model))
    assert "height" not in vars(model)


def test_a_path_through_a_missing_module_changes_nothing():
    model = Tied()
    with pytest.raises(KeyError):
        set_attributes(model, {"width": 3, "third.in_features": 3})
    assert model.width == 6
