"""Meta copies, and examples of another batch size on the meta device."""

import collections
import dataclasses

import pytest
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from torch import nn

from timm_autoslim.errors import TraceError
from timm_autoslim.utils.meta import copy_to_meta, fix_seed, make_meta_example, run_model
from timm_autoslim.utils.tensors import named_tensors

Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Batch:
    picture: torch.Tensor
    scale: float


def test_a_meta_copy_has_every_shape_and_no_data_and_leaves_the_model():
    model = randomise(TwoGroups())
    model.table = torch.ones(3)
    model.head.weight.requires_grad_(False)
    before = snapshot(model)
    copied = copy_to_meta(model)
    assert_same(before, snapshot(model))
    assert type(copied) is TwoGroups
    tensors = named_tensors(copied)
    assert {n: (t.shape, t.dtype, t.requires_grad, type(t)) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype, t.requires_grad, type(t)) for n, t in named_tensors(model).items()
    }
    assert all(t.is_meta for t in tensors.values())
    assert copied(torch.zeros(2, 3, 8, 8, device="meta")).shape == (2, 10)


def test_tied_weights_are_tied_in_the_copy():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    copied = copy_to_meta(model)
    assert copied[1].weight is copied[0].weight


def test_an_attribute_that_cannot_be_copied_is_named():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    model[1].state = (i for i in range(3))
    message = (
        r"^1\.state: cannot be copied \(TypeError: cannot pickle .*generator.*; needed: a model that copy.deepcopy"
    )
    with pytest.raises(TraceError, match=f"{message} copies; set the attr"):
        copy_to_meta(model)


def test_activations_that_a_module_has_collected_are_copied_without_their_history():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    model[1].state = [torch.ones(2, requires_grad=True) * 2]
    (state,) = copy_to_meta(model)[1].state
    assert (state.tolist(), state.grad_fn) == ([2, 2], None)


def test_random_numbers_are_the_same_in_every_block_and_the_generator_is_put_back():
    before, draws = torch.get_rng_state(), []
    for _ in range(2):
        with fix_seed():
            draws.append(torch.rand(4))
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_runs_on_one_input_a_tuple_or_a_dict():
    def model(x, scale=1):
        return x, scale

    assert run_model(model, 5) == (5, 1)
    assert run_model(model, [5]) == ([5], 1)
    assert run_model(model, (5, 2)) == (5, 2)
    assert run_model(model, {"x": 5, "scale": 2}) == (5, 2)


def shapes(value):
    """Return a nested value with the shape of each tensor in its place, and check that it is a meta tensor."""
    if isinstance(value, torch.Tensor):
        assert value.is_meta
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [shapes(member) for member in value]
    return {key: shapes(member) for key, member in value.items()} if isinstance(value, dict) else value


IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (IMAGE, (5, 3, 8, 8)),
        ((IMAGE, None, 2, "name"), [(5, 3, 8, 8), None, 2, "name"]),
        ((torch.zeros(()), IMAGE, torch.zeros(1, 7), torch.zeros(8)), [(), (5, 3, 8, 8), (5, 7), (8,)]),
        ({"x": IMAGE, "pair": [IMAGE, {"n": 3}]}, {"x": (5, 3, 8, 8), "pair": [(5, 3, 8, 8), {"n": 3}]}),
        ((torch.zeros(4, 2), torch.zeros(1, 2)), [(5, 2), (1, 2)]),
    ],
)
def test_the_batch_changes_and_all_else_stays(example, expected):
    assert shapes(make_meta_example(example, 5)) == expected


def test_containers_keep_their_types_and_the_example_stays():
    example = (Pair(IMAGE, 7), Batch(IMAGE, 2.0), collections.OrderedDict(x=IMAGE))
    pair, batch, mapping = make_meta_example(example, 2)
    assert (type(pair), type(batch), type(mapping)) == (Pair, Batch, collections.OrderedDict)
    assert pair.first.shape == batch.picture.shape == mapping["x"].shape == (2, 3, 8, 8)
    assert (pair.second, batch.scale) == (7, 2.0)
    assert example[1].picture is example[2]["x"] is IMAGE


def test_types_of_numbers_are_kept():
    ids = make_meta_example((IMAGE.half(), torch.zeros(1, 5, dtype=torch.long)), 3)
    assert [t.dtype for t in ids] == [torch.float16, torch.long]
