"""Attributes set by path, in modules and in containers of every kind."""

from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers.tied import SLICED_ATTRIBUTES, TIED_SLICES, Tied
from torch import nn

from timm_autoslim.slicing.attributes import set_attributes


def test_attributes_are_set_in_modules_lists_tuples_and_dicts():
    model = nn.Sequential(Tied())
    set_attributes(model, {f"0.{path}": value for path, value in TIED_SLICES.attributes.items()})
    assert {name: vars(model[0])[name] for name in SLICED_ATTRIBUTES} == SLICED_ATTRIBUTES
    assert model[0].first.in_features == 3


def test_a_list_that_a_configuration_shares_stays_as_it_is():
    model, config = nn.Linear(2, 2), [192, 384]
    model.embed_dim = config
    set_attributes(model, {"embed_dim.1": 100, "embed_dim.0": 50})
    assert model.embed_dim == [50, 100]
    assert config == [192, 384]


def test_a_dict_that_two_modules_share_is_changed_for_both():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].infos = [{"num_chs": 6}]
    model[1].infos = model[0].infos
    set_attributes(model, {"0.infos.0.num_chs": 3})
    assert model[1].infos == [{"num_chs": 3}]


def test_an_object_is_copied_with_all_that_changes_in_it():
    model, config = nn.Linear(2, 2), SimpleNamespace(width=8, depths=[2, 2], info=[{"num_chs": 6}])
    model.config = config
    values = {"config.width": 4, "config.depths.0": 1, "config.info.0.num_chs": 3}
    set_attributes(model, values)
    assert model.config == SimpleNamespace(width=4, depths=[1, 2], info=[{"num_chs": 3}])
    assert config == SimpleNamespace(width=8, depths=[2, 2], info=[{"num_chs": 6}])


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


def test_a_tensor_gets_the_value_in_all_elements_of_a_new_tensor():
    model = nn.Sequential(nn.Linear(2, 2))
    layer = model[0]
    layer.size, layer.scale, layer.other = 4, torch.full((2, 1), 0.5, dtype=torch.float64), torch.tensor(2.0)
    layer.register_buffer("factor", torch.ones(3))
    before = layer.scale
    set_attributes(model, {"0.size": 2, "0.scale": 0.25, "0.factor": 3.0, "0.other": 4.0})
    assert layer.scale.dtype == torch.float64
    assert layer.scale.tolist() == [[0.25], [0.25]]
    assert before.tolist() == [[0.5], [0.5]]
    assert layer.other == 4
    assert dict(layer.named_buffers())["factor"].tolist() == [3.0, 3.0, 3.0]


class Items(dict):
    """A dict whose items are its attributes too."""

    def __init__(self, **items):
        super().__init__(items)
        vars(self).update(items)


@dataclass(frozen=True)
class Frozen:
    width: int


class Single(SimpleNamespace):
    """An object that is never copied."""

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


KINDS = [Items, SimpleNamespace, Frozen, Single, Namespace]


@pytest.mark.parametrize(
    ("kind", "has_own_dicts"),
    [(kind, False) for kind in (dict, OrderedDict, *KINDS)] + [(kind, True) for kind in KINDS],
)
def test_models_of_one_configuration_stay_as_they_are(kind, has_own_dicts):
    config = kind(width=8)
    model, other = (nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(2))
    for module in (*model, *other):
        module.config = config
    set_attributes(model, {"0.config.width": 4}, has_own_dicts=has_own_dicts)
    assert config == kind(width=8)
    assert other[0].config is other[1].config is config
    assert model[0].config == kind(width=4)
    assert model[1].config is model[0].config
    assert type(model[0].config) is kind


def test_a_part_of_a_configuration_is_one_object_in_all_modules_still():
    part = SimpleNamespace(width=8, sizes=[4, 6])
    config = SimpleNamespace(vision=part, further=[part, (part, {"part": part})], text=SimpleNamespace(width=8))
    part.parent = config
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    model[0].config, model[1].config, model[2].parts = config, part, {"vision": part}
    set_attributes(model, {"1.config.width": 4, "1.config.sizes.1": 3})
    changed = model[1].config
    assert (changed.width, changed.sizes) == (4, [4, 3])
    assert (part.width, part.sizes, part.parent) == (8, [4, 6], config)
    assert model[0].config.vision is model[2].parts["vision"] is changed
    first, (second, third) = model[0].config.further
    assert first is second is third["part"] is changed
    assert changed.parent is model[0].config
    assert model[0].config.text is config.text
    assert config.vision is config.further[0] is config.further[1][0] is part


def test_a_missing_member_of_an_object_is_named_and_not_created():
    model, config = nn.Linear(2, 2), SimpleNamespace(width=8)
    model.config = config
    for path in ("config.height", "config.width.size", "config.size.width"):
        with pytest.raises(KeyError, match=f"{path}: the model has no such attribute"):
            set_attributes(model, {path: 3})
    assert vars(config) == {"width": 8}
