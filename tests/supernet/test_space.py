"""The search space: groups, and the widths made by its methods."""

import json

import numpy as np
import pytest
import timm
import torch
from helpers.models import TwoGroups
from helpers.widths import arbitrary_widths
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d
from torch import nn

from timm_autoslim import convert, cost
from timm_autoslim.errors import WidthError
from timm_autoslim.utils.amounts import write_amount

IMAGE = torch.zeros(1, 3, 8, 8)


class Depthwise(nn.Module):
    """A stem and a grouped convolution (groups of 4 channels), so that one width counts four channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.grouped = nn.Conv2d(32, 32, 3, groups=8)
        self.head = nn.Conv2d(32, 10, 1)

    def forward(self, x):
        return self.head(self.grouped(self.stem(x).relu()).relu()).mean((2, 3))


@pytest.fixture(scope="module")
def supernet():
    return convert(TwoGroups(32), IMAGE)


@pytest.fixture(scope="module")
def space(supernet):
    return supernet.space


def test_a_space_is_a_collection_of_names():
    space = convert(TwoGroups(), torch.zeros(1, 3, 8, 8)).space
    assert list(space) == list(space.names)
    assert space.names[0] in space
    assert "no group" not in space
    assert 0 not in space


def test_groups_carry_the_name_of_the_module_that_makes_their_channels(space):
    stem, inner = space.groups
    assert (stem.name, stem.size, stem.channels) == ("stem", 32, 1)
    assert (inner.name, inner.size, inner.channels) == ("inner", 64, 1)
    assert stem.producers == ("stem", "outer")
    assert inner.producers == ("inner",)
    assert len(space) == 2
    assert space["inner"] is inner


def test_min_uniform_and_max(space):
    assert space.max().to_dict() == {"stem": 32, "inner": 64}
    assert space.min().to_dict() == {"stem": 8, "inner": 16}
    assert space.uniform(0.5).to_dict() == {"stem": 16, "inner": 32}
    assert space.uniform(1) == space.max()
    assert space.uniform(0.01) == space.min()


def test_uniform_takes_the_nearest_choice_the_wider_of_two_or_the_exact_number(space):
    assert space.uniform(0.57).to_dict() == {"stem": 20, "inner": 40}  # 18.2 and 36.5: nearest multiples
    assert space.uniform(0.6875).to_dict() == {"stem": 24, "inner": 48}  # 22 is between 20 and 24, 44 between 40 and 48
    assert space.uniform(0.57, exact=True).to_dict() == {"stem": 18, "inner": 36}
    assert space.uniform(0.01, exact=True) == space.min()


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), None, "0.5", True])
def test_a_uniform_ratio_out_of_range_is_refused(space, ratio):
    with pytest.raises(WidthError, match=rf"ratio: got {ratio!r}; needed: a number above 0 and at most 1"):
        space.uniform(ratio)


def test_a_seed_is_no_generator(space):
    for draw in (space.sample, space.sample_multiplier):
        with pytest.raises(WidthError, match=r"generator: got 5; needed: a torch\.Generator, such as"):
            draw(5)


def test_sampling_is_random_over_all_choices_and_repeats_with_its_generator(space):
    draws = [[space.sample(g) for _ in range(600)] for g in (torch.Generator().manual_seed(3) for _ in range(2))]
    assert draws[0] == draws[1]
    for group in space.groups:
        assert {w[group.name] for w in draws[0]} == set(group.choices)
    assert len(set(draws[0])) == 7 * 7  # the groups are drawn independently
    torch.manual_seed(1)
    first = [space.sample() for _ in range(20)]
    assert first != [space.sample() for _ in range(20)]


def test_steps_draw_from_few_widths_the_least_and_the_largest_among_them():
    space = convert(TwoGroups(64), torch.zeros(1, 3, 8, 8), divisor=4).space
    generator = torch.Generator().manual_seed(0)
    for group in space.groups:
        drawn = {space.sample(generator, steps=4)[group.name] for _ in range(200)}
        assert len(drawn) == min(5, len(group.choices))
        assert drawn <= set(group.choices)
        assert {group.choices[0], group.size} <= drawn
    with pytest.raises(WidthError, match=r"^steps: got 0; needed: a positive integer"):
        space.sample(steps=0)


def test_a_multiplier_is_shared_by_all_groups_and_repeats_with_its_generator(space):
    draws = [[space.sample_multiplier(g) for _ in range(600)] for g in (torch.Generator().manual_seed(3) for _ in "ab")]
    assert draws[0] == draws[1]
    assert all(2 * widths["stem"] == widths["inner"] for widths in draws[0])
    assert {widths["stem"] for widths in draws[0]} == set(space["stem"].choices)
    counts = [sum(widths["stem"] == choice for widths in draws[0]) for choice in (12, 16, 20, 24, 28)]
    assert min(counts) > 60  # each about 100 of 600; the ends, which half as many multipliers round to, about 50
    assert max(counts) < 140


def test_a_multiplier_reaches_below_the_narrowest_of_a_group_that_cannot_follow():
    space = convert(TwoGroups(32), IMAGE, min={"inner": 0.75, "stem": 0.25}).space
    generator = torch.Generator().manual_seed(0)
    draws = {space.sample_multiplier(generator) for _ in range(300)}
    assert space.min() in draws
    assert space.max() in draws
    assert all(widths["inner"] == 48 for widths in draws if widths["stem"] <= 20)
    fixed = convert(TwoGroups(32), IMAGE, min=1.0).space
    assert fixed.sample_multiplier(generator) == fixed.max()


def test_sampling_leaves_the_global_generator_alone(space):
    before = torch.get_rng_state()
    space.sample(torch.Generator().manual_seed(3))
    space.sample_multiplier(torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 32), st.integers(1, 64))
def test_any_width_from_one_to_the_size_goes_through_json_and_back(supernet, stem, inner):
    space = supernet.space
    widths = space.from_dict({"inner": inner, "stem": stem})
    assert space.from_dict(json.loads(json.dumps(widths.to_dict()))) == widths
    assert space.from_channels({"stem": stem, "inner": inner}) == widths
    assert space.channels(widths) == {"stem": stem, "inner": inner, "outer": stem, "head": 10}
    kept = supernet.graph.slices(widths.values_).tensors
    assert kept.get("inner.weight", (None,) * 4)[:2] == (
        None if inner == 64 else ((0, inner),),
        None if stem == 32 else ((0, stem),),
    )


def test_numpys_integers_become_pythons_own(supernet):
    space = supernet.space
    four = np.int64(4)
    expected = space.from_dict({"stem": 32, "inner": 4})
    for widths in (
        space.from_dict({"stem": np.int32(32), "inner": four}),
        space.from_channels({"inner": four}),
        space.max().replace("inner", four),
    ):
        assert widths == expected
        assert [type(width) for width in widths.values()] == [int, int]
    spec = supernet.extract(space.from_channels({"inner": four})).autoslim
    assert json.loads(json.dumps(spec.to_dict()))["widths"]["inner"] == 4


def test_the_floor_of_a_group_holds_for_every_way_to_widths():
    """A standardised weight with a single value would be divided by a deviation of nothing."""
    space = convert(nn.Sequential(nn.Conv2d(3, 8, 1), ScaledStdConv2d(8, 8, 1), nn.Conv2d(8, 4, 1)), IMAGE).space
    assert space["0"].floor == 2
    assert space.from_channels({"0": 2})["0"] == 2
    with pytest.raises(WidthError, match=r"0: got 1 channels; needed: an integer from 2 to 8"):
        space.from_channels({"0": 1})
    with pytest.raises(WidthError, match=r"0: got the width 1; needed: an integer from 2 to 8"):
        space.max().replace("0", 1)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"stem": 8}, r"inner: got no width \(1 of 2 are missing\); needed: a width for every group"),
        (
            {"stem": 8, "innr": 8},
            r"the search space: got 'innr'; needed: one of the 2 groups; the closest are \['inner'\]",
        ),
        ({"xyz": 8}, r"the search space: got 'xyz'; needed: one of the 2 groups; the groups are \['stem', 'inner'\]"),
        ({"stem": 0, "inner": 8}, r"stem: got the width 0; needed: an integer from 1 to 32"),
        ({"stem": 8, "inner": 65}, r"inner: got the width 65; needed: an integer from 1 to 64"),
        (None, r"widths: got a NoneType; needed: a dict \{group: width\}"),
        (["stem", "inner"], r"widths: got a list; needed: a dict \{group: width\}"),
    ],
)
def test_from_dict_names_what_is_wrong(space, widths, message):
    with pytest.raises(WidthError, match=message):
        space.from_dict(widths)


def test_from_channels_takes_any_producer_and_leaves_other_groups_at_their_size(space):
    assert space.from_channels({}) == space.max()
    assert space.from_channels({"outer": 5}).to_dict() == {"stem": 5, "inner": 64}
    assert space.from_channels({"outer": 5, "stem": 5}).to_dict() == {"stem": 5, "inner": 64}


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (
            {"stem": 8, "outer": 9},
            r"outer: got 9 channels, where stem has 8; needed: numbers that agree: both are the group 'stem'",
        ),
        ({"bn": 8}, r"bn: got a module that produces no channels; needed: a module that produces channels: \[.*'stem'"),
        ({"head": 8}, r"head: got a module whose 10 channels are fixed \(.*an output of the model\); needed"),
        ({"inner": 65}, r"inner: got 65 channels; needed: an integer from 1 to 64"),
        (None, r"channels: got a NoneType; needed: a dict \{module: channels\}"),
    ],
)
def test_from_channels_names_what_is_wrong(space, channels, message):
    with pytest.raises(WidthError, match=message):
        space.from_channels(channels)


def test_a_grouped_convolution_counts_channels_in_steps():
    space = convert(Depthwise(), IMAGE).space
    (group,) = space.groups
    assert (group.name, group.size, group.channels) == ("stem", 8, 4)
    assert space.from_channels({"grouped": 12}).to_dict() == {"stem": 3}
    assert space.channels(space.from_dict({"stem": 3})) == {"stem": 12, "grouped": 12, "head": 10}
    with pytest.raises(WidthError, match=r"grouped: got 10 channels; needed: an integer from 4 to 32 in steps of 4"):
        space.from_channels({"grouped": 10})


def test_widths_of_another_model_are_refused(space):
    other = convert(TwoGroups(16), IMAGE).space
    with pytest.raises(
        WidthError, match=r"got widths of another model \(2 groups, space \w+\); needed: widths of this space"
    ):
        space.check(other.max())
    with pytest.raises(WidthError, match=r"widths: got a dict; needed: Widths, from supernet\.space\.from_dict"):
        space.check({"stem": 8, "inner": 8})
    assert (
        space.check(convert(TwoGroups(32), IMAGE).space.min()) == space.min()
    )  # the same architecture is the same space


def test_an_unknown_group_is_named(space):
    with pytest.raises(
        WidthError, match=r"the search space: got 'stam'; needed: one of the 2 groups; the closest are \['stem'\]"
    ):
        space["stam"]


def test_the_table_shows_groups_and_cost(supernet):
    space = supernet.space
    lines = str(space).splitlines()
    assert lines[0].split() == ["group", "size", "min", "divisor", "choices", "modules"]
    assert lines[2].split() == ["stem", "32", "8", "4", "7", "2"]
    assert lines[3].split() == ["inner", "64", "16", "8", "7", "1"]
    for line, widths in zip(lines[-3:], (space.min(), space.uniform(0.5), space.max()), strict=True):
        spent = cost(supernet, widths)
        assert f"{write_amount(spent.macs, 1)} MACs" in line
        assert f"{write_amount(spent.params, 2)} params" in line
    assert lines[-1].count("100.0%") == 2


def test_the_space_of_a_real_network_reads_like_the_network():
    space = convert(timm.create_model("resnet10t"), torch.zeros(1, 3, 64, 64)).space
    assert space.names[:4] == ("conv1.0", "conv1.3", "conv1.6", "layer1.0.conv1")
    assert space["layer2.0.conv2"].producers == ("layer2.0.conv2", "layer2.0.downsample.1")
    widths = arbitrary_widths(space, torch.Generator().manual_seed(0))
    channels = space.channels(widths)
    del channels["fc"]
    assert space.from_channels(channels) == widths
