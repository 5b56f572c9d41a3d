"""The moves that operator rules are made of: labels of tensors, what they join, freeze and tie."""

import numpy as np
import pytest
import torch

from timm_autoslim.tracing.calls import FunctionCall
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.origins import FromAttribute
from timm_autoslim.tracing.sizes import Size


@pytest.fixture
def flow():
    return Flow()


def meta(*shape):
    return torch.empty(shape, device="meta")


def attribute(value, path="layer.width"):
    return Size(value, FromAttribute(path))


def reasons(flow):
    return [reason for _, reason in flow.constraints.frozen_vectors]


# -- labels -----------------------------------------------------------------------------------------------------------


def test_a_tensor_that_no_rule_has_labelled_carries_no_channels(flow):
    assert flow.get_labels(meta(2, 3, 4)) == [None, None, None]


def test_a_weight_gets_atoms_of_its_own_but_none_where_its_length_is_one(flow):
    labels = flow.create_labels(meta(4, 1, 3))
    assert [None if v is None else v.tolist() for v in labels] == [[0, 1, 2, 3], None, [4, 5, 6]]
    assert flow.create_labels(meta(2))[0].tolist() == [7, 8]


def test_a_label_must_be_as_long_as_its_dimension(flow):
    with pytest.raises(AssertionError):
        flow.set_labels(meta(2, 3), [None, flow.atoms.create(4)])
    with pytest.raises(AssertionError):
        flow.set_labels(meta(2, 3), [None])


# -- what lives and dies together -------------------------------------------------------------------------------------


def test_joined_dimensions_are_one(flow):
    a, b = flow.atoms.create(3), flow.atoms.create(3)
    assert flow.join(a, b, "add") is a
    assert flow.atoms.find(b).tolist() == a.tolist()
    assert not flow.constraints.frozen_vectors


@pytest.mark.parametrize("swap", [False, True])
def test_channels_that_meet_a_dimension_without_channels_stay(flow, swap):
    label = flow.atoms.create(3)
    flow.stack.paths.append("layer1.conv")
    assert flow.join(*((None, label) if swap else (label, None)), "add") is label
    assert reasons(flow) == ["layer1.conv: add combines these channels with a dimension that cannot shrink"]
    assert flow.is_frozen(label)


def test_broadcasting_aligns_at_the_right_and_leaves_dimensions_of_one_out(flow):
    image, bias, scale = meta(2, 4, 8), meta(8), meta(4, 1)
    for tensor in (image, bias, scale):
        flow.create_labels(tensor)
    (_, channels, columns), (of_bias,), (of_scale, _) = (flow.get_labels(t) for t in (image, bias, scale))
    out = flow.broadcast([image, bias, scale], (2, 4, 8), "add")
    assert out[1] is channels
    assert out[2] is columns
    assert flow.atoms.find(of_bias).tolist() == columns.tolist()
    assert flow.atoms.find(of_scale).tolist() == channels.tolist()


def test_channels_stay_where_what_they_are_joined_with_stays_even_later(flow):
    a, b, other = (flow.atoms.create(2) for _ in range(3))
    assert not flow.is_frozen(a)
    flow.freeze_label(b, "a reason")
    assert not flow.is_frozen(a)
    flow.join(a, b, "add")
    assert flow.is_frozen(a)
    assert not flow.is_frozen(np.concatenate([a, other]))


def test_an_index_of_channels_holds_them_only_if_it_is_read(flow):
    index, label = meta(1), flow.atoms.create(3)
    flow.stack.paths.append("pool")
    flow.mark_indices(index, [label, None])
    assert not flow.is_frozen(label)
    flow.mark_read(index)
    assert flow.is_frozen(label)
    assert reasons(flow) == ["pool: it returns indices of these channels"]


# -- sizes that the model's code gives --------------------------------------------------------------------------------


def test_sizes_remember_the_dimension_that_they_are_of(flow):
    tensor = meta(2, 4)
    flow.set_labels(tensor, [None, flow.atoms.create(4)])
    batch, channels = flow.get_sizes(tensor)
    assert type(batch) is int
    assert channels.origin.vector.tolist() == [0, 1, 2, 3]


def test_sizes_are_recognised_among_the_arguments_of_the_running_function(flow):
    width = attribute(6)
    flow.call = FunctionCall("view", (meta(2, 6), 2, width), {"other": (-1, 9)})
    assert flow.call.find_sizes([2, 6])[1] is width
    assert flow.call.find_sizes([3, 9]) == [-1, 9]
    assert flow.call.find_sizes([3, 4]) is None
    assert flow.call.find_size(6) is width
    assert type(flow.call.find_size(5)) is int


@pytest.mark.parametrize("size", [4, True + 3])
def test_a_literal_size_holds_the_channels(flow, size):
    label = flow.atoms.create(4)
    flow.call = FunctionCall("narrow", (), {})
    flow.constrain(label, size)
    assert reasons(flow) == ["the model: the code passes the constant 4 to narrow"]
    flow.constrain(flow.atoms.create(4), -1)  # the rest, whatever that is
    assert len(flow.constraints.frozen_vectors) == 1


def test_a_size_of_other_channels_ties_the_counts(flow):
    one, other = meta(4), flow.atoms.create(8)
    flow.create_labels(one)
    flow.constrain(other, 2 * flow.get_sizes(one)[0])
    (tie,) = flow.constraints.count_ties
    assert [v.tolist() for v in tie] == [other.tolist(), flow.get_labels(one)[0].tolist()]


def test_a_size_from_an_attribute_binds_it_to_the_channels(flow):
    label = flow.atoms.create(8)
    flow.constrain(label, attribute(4) * 2)
    flow.constrain(None, attribute(3, "layer.heads"))
    uses = {
        use.path: (use.value, None if use.vector is None else len(use.vector)) for use in flow.constraints.attributes
    }
    assert uses == {"layer.width": (4, 8), "layer.heads": (3, None)}
    assert not flow.constraints.frozen_vectors


def test_of_two_attributes_the_one_that_shrinks_elsewhere_shrinks_and_the_other_stays(flow):
    heads, channels = attribute(4, "heads"), attribute(2, "channels")
    flow.constrain(flow.atoms.create(2), channels)
    label = flow.atoms.create(8)
    flow.constrain(label, heads * channels)
    uses = [(use.path, use.vector is label) for use in flow.constraints.attributes[1:]]
    assert uses == [("heads", False), ("channels", True)]


def test_a_difference_of_attributes_counts_both_parts(flow):
    part, rest = flow.atoms.create(3), flow.atoms.create(5)
    flow.constrain(part, attribute(3, "part"))
    flow.constrain(rest, attribute(8, "all") - attribute(3, "part"))
    use = flow.constraints.attributes[-1]
    assert use.path == "all"
    assert use.vector.tolist() == [*part, *rest]


def test_a_dimension_of_a_size_that_is_known_has_its_channels(flow):
    tensor = meta(4)
    (label,) = flow.create_labels(tensor)
    assert flow.label_new_dimension(4, flow.get_sizes(tensor)[0]) is label
    assert flow.label_new_dimension(4, 4) is None
    assert len(flow.label_new_dimension(4, attribute(4))) == 4
    flow.constrain(None, attribute(5, "fixed"))
    assert flow.label_new_dimension(5, attribute(5, "fixed")) is None


# -- splitting --------------------------------------------------------------------------------------------------------


def test_a_split_shrinks_its_last_dimension_and_joins_all_others(flow):
    label = flow.atoms.create(12)
    heads, last = flow.split(label, [3, 4], [attribute(3), -1])
    assert heads is None
    assert last.tolist() == [0, 1, 2, 3]
    assert flow.atoms.find_all().tolist() == [0, 1, 2, 3] * 3


def test_a_split_into_pairs_shrinks_the_number_of_pairs(flow):
    pairs, last = flow.split(flow.atoms.create(8), [4, 2], [-1, attribute(2)])
    assert pairs.tolist() == [0, 2, 4, 6]
    assert last is None


def test_a_split_shrinks_the_dimension_whose_size_is_no_literal(flow):
    first, last = flow.split(flow.atoms.create(12), [4, 3], [-1, 3])
    assert first.tolist() == [0, 3, 6, 9]
    assert last is None


def test_a_split_into_literal_sizes_holds_the_channels(flow):
    label = flow.atoms.create(12)
    flow.call = FunctionCall("view", (), {})
    assert flow.split(label, [3, 4], [3, 4]) == [None, None]
    assert reasons(flow) == ["the model: view splits these channels into the constant sizes [3, 4]"]


def test_a_split_of_what_was_merged_takes_the_channels_apart_again(flow):
    channels = flow.atoms.create(3)
    first, last = flow.split(np.repeat(channels, 4), [3, 4], [3, 4])
    assert first.tolist() == channels.tolist()
    assert last is None
    assert flow.atoms.find_all().tolist() == [0, 1, 2]


@pytest.mark.parametrize("glob", ["blocks.*.attn", "*"])
def test_where_the_user_says_so_a_split_shrinks_the_number_of_heads(glob):
    flow = Flow([glob, "no_such"])
    flow.stack.paths.append("blocks.0.attn")
    heads, last = flow.split(flow.atoms.create(12), [3, 4], [attribute(3), -1])
    assert heads.tolist() == [0, 4, 8]
    assert last is None
    assert flow.matching_globs == {glob}


def test_where_joining_would_merge_channels_of_one_row_they_are_tied_by_count_and_position(flow):
    one, other = flow.atoms.create(2)
    crossed = np.array([one, other, other, one])
    _, last = flow.split(crossed, [2, 2], [2, -1])
    assert flow.atoms.find_all().tolist() == [0, 1, 2, 3]
    assert last.tolist() == [2, 3]
    assert [v.tolist() for v in flow.constraints.count_ties[0]] == [[2, 3], [0, 1, 1, 0]]
    assert [v.tolist() for v in flow.constraints.ordered_vectors] == [[0, 1, 1, 0], [2, 3]]


# -- products ---------------------------------------------------------------------------------------------------------


def test_a_product_is_counted_once_and_only_while_macs_are_counted(flow):
    label = flow.atoms.create(6)
    flow.add_contraction(1, [(6, label)])
    assert flow.contractions == []
    flow.count_macs = True
    flow.stack.paths.append("head")
    flow.add_contraction(2, [(6, label), (5, None), (3, None)])
    (contraction,) = flow.contractions
    assert (contraction.path, contraction.constant) == ("head", 30)
    assert contraction.vectors == (label,)


def test_producers_are_noted_in_the_order_of_execution(flow):
    for path in ("stem", "head"):
        flow.stack.paths.append(path)
        flow.add_producer(flow.atoms.create(2))
        flow.add_producer(None)
    assert [(path, v.tolist()) for path, v in flow.constraints.producers] == [("stem", [0, 1]), ("head", [2, 3])]
