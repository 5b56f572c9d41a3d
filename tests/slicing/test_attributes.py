"""Attributes set by path, in modules and in containers of every kind."""

from types import SimpleNamespace

import pytest
from helpers.tied import SLICED_ATTRIBUTES, TIED_SLICES, Tied
from torch import nn

from timm_autoslim.slicing.attributes import set_attributes


def test_attributes_are_set_in_modules_lists_tuples_and_dicts():
    model = nn.Sequential(Tied())
    set_attributes(model, {f"0.{path}": value for path, value in TIED_SLICES.attributes.items()})
    assert {name: vars(model[0])[name] for name in SLICED_ATTRIBUTES} == SLICED_ATTRIBUTES
    assert model[0].first.in_features == 3


def test_what_others_may_share_stays_as_it_is():
    model = nn.Linear(2, 2)
    sizes, infos, config = [192, 384], [{"num_chs": 6}], SimpleNamespace(width=8, depths=[2, 2])
    model.embed_dim, model.infos, model.config = sizes, infos, config
    set_attributes(model, {"embed_dim.1": 100, "embed_dim.0": 50, "infos.0.num_chs": 3, "config.depths.0": 1})
    assert (model.embed_dim, model.infos, model.config.depths) == ([50, 100], [{"num_chs": 3}], [1, 2])
    assert (sizes, infos, config.depths) == ([192, 384], [{"num_chs": 6}], [2, 2])


def test_members_of_one_tuple_are_set_one_after_the_other():
    model = Tied()
    set_attributes(model, {"shape.0": 3, "shape.1": 1, "info.0.sizes.0": 4, "info.0.sizes.1": 5})
    assert (model.shape, model.info[0]["sizes"]) == ((3, 1), (4, 5))


@pytest.mark.parametrize(
    ("path", "error"),
    [("height", KeyError), ("shape.2", IndexError), ("parts.2", IndexError), ("third.in_features", KeyError)],
)
def test_a_missing_attribute_is_named_and_not_created(path, error):
    model = Tied()
    with pytest.raises(error, match=f"{path}: the model has no such attribute"):
        set_attributes(model, {path: 3})
    assert "height" not in vars(model)
