"""The tensors of nested values and of models, each once and by name."""

import collections
import dataclasses
import types

import pytest
import torch
from torch import nn

from timm_autoslim.utils.tensors import (
    collect_tensors,
    find_tied_names,
    get_attributes,
    list_leaves,
    map_tensors,
    named_tensors,
)

A, B, C = torch.zeros(1), torch.zeros(2), torch.zeros(3)
Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Record:
    first: object
    second: object


class Slots:
    __slots__ = ("first", "second")

    def __init__(self, first, second=None):
        self.first = first
        if second is not None:
            self.second = second


class OneSlot(Slots):
    __slots__ = "third"


NESTED = [
    (A, B, C),
    [A, [B, (C, None)]],
    {"a": A, "b": {"c": B}, "d": [C]},
    collections.deque([A, B, C]),
    collections.OrderedDict(a=A, b=(B, C)),
    Pair(A, Pair(B, C)),
    Record(A, {"b": B, "c": C}),
    Slots(A, [B, C]),
    types.SimpleNamespace(a=A, name="b", number=3, pair=(B, C)),
]
WITHOUT = [None, 3, 2.0, "text", b"text", int, nn.Linear(2, 2), [], {}, object()]


@pytest.mark.parametrize("value", NESTED, ids=lambda value: type(value).__name__)
def test_tensors_of_nested_values_come_in_their_order(value):
    tensors = collect_tensors(value)
    assert [id(t) for t in tensors] == [id(A), id(B), id(C)]


@pytest.mark.parametrize("value", WITHOUT)
def test_values_without_tensors_have_none(value):
    assert collect_tensors(value) == []


def test_an_object_that_holds_itself_is_walked_once():
    value = types.SimpleNamespace(tensor=A)
    value.itself = value
    assert len(collect_tensors([value, value])) == 1
    assert len(collect_tensors([A, A])) == 2  # a tensor counts at each of its places


@pytest.mark.parametrize("value", NESTED, ids=lambda value: type(value).__name__)
def test_every_tensor_is_replaced_and_all_else_stays(value):
    result = map_tensors(lambda tensor: tensor + 1, value)
    assert type(result) is type(value)
    assert [t.tolist() for t in collect_tensors(result)] == [[1], [1, 1], [1, 1, 1]]
    assert [id(t) for t in collect_tensors(value)] == [id(A), id(B), id(C)]


@pytest.mark.parametrize("value", WITHOUT)
def test_values_without_tensors_stay(value):
    assert map_tensors(lambda tensor: tensor + 1, value) == value


def test_an_object_that_holds_itself_is_copied_once():
    value = types.SimpleNamespace(tensor=A, number=3)
    value.itself = value
    result = map_tensors(lambda tensor: tensor + 1, [value, value])
    assert result[0] is result[1] is result[0].itself is not value
    assert (result[0].tensor.item(), result[0].number, value.tensor.item()) == (1, 3, 0)
    assert map_tensors(lambda tensor: tensor + 1, types.MappingProxyType({"a": A})) == {"a": A + 1}


def test_attributes_are_those_of_dict_and_slots():
    value = OneSlot(1)
    value.third = 3
    assert get_attributes(value) == {"first": 1, "third": 3}
    assert get_attributes(Record(1, 2)) == {"first": 1, "second": 2}
    assert get_attributes(3) == {}


class Tied(nn.Module):
    """One weight at three names, a module at two paths, and a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.again = self.first
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.table = torch.zeros(2)
        self.register_buffer("mask", None)


def test_tensors_of_a_model_appear_once_by_their_first_name():
    model = Tied()
    tensors = named_tensors(model)
    assert list(tensors) == ["table", "first.weight", "first.bias", "norm.running_mean", "norm.running_var",
                             "norm.num_batches_tracked"]  # fmt: skip
    assert tensors["first.weight"] is model.second.weight
    assert tensors["table"] is model.table


def test_tied_names_lead_to_the_first_name():
    assert find_tied_names(Tied()) == {
        "second.weight": "first.weight",
        "again.weight": "first.weight",
        "again.bias": "first.bias",
    }
    assert find_tied_names(nn.Linear(2, 2)) == {}


def test_leaves_of_what_holds_itself_are_listed_once():
    pair = [1, Pair(2, 3)]
    pair.append(pair)
    assert sorted(list_leaves([pair, (pair, 4)])) == [1, 2, 3, 4]
    assert list(list_leaves({1: 2})) == [{1: 2}]
