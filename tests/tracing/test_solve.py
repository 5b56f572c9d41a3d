"""Units, strands and groups of what a trace observed, on observations that are made by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.labels import AttributeUse
from timm_autoslim.tracing.observe import observe
from timm_autoslim.tracing.solve import solve


class Observed:
    """A trace of tensors with one axis each."""

    def __init__(self, **lengths):
        self.flow = Flow()
        self.axes = {name: self.flow.atoms.create(n) for name, n in lengths.items()}
        self.constraints = self.flow.constraints

    def produce(self, *names):
        for name in names:
            self.constraints.producers.append((name, self.axes[name]))

    def solve(self, without=()):
        """Solve; the axes `without` are of no tensor."""
        labels = {name: [v] for name, v in self.axes.items() if name not in without}
        shapes = {name: (len(v),) for name, v in self.axes.items()}
        return solve(observe(self.flow, labels, shapes, list(labels)))

    def strands(self, solution):
        """Return the strand at every index of every axis, numbered in the order in which they appear; "-" is fixed."""
        numbers = {-1: "-"}
        return {
            name: "".join(numbers.setdefault(strand, str(len(numbers) - 1)) for strand in solution.strand[v].tolist())
            for name, v in self.axes.items()
        }


def test_every_axis_that_nothing_ties_is_a_strand_and_a_group_of_its_own():
    trace = Observed(a=4, b=6)
    trace.produce("b", "a")  # in the order of execution
    solution = trace.solve()
    assert solution.names == ("b", "a")
    assert solution.sizes == (6, 4)
    strands = {(s.size, s.group, s.ratio, s.ordered, s.producers) for s in solution.strands}
    assert strands == {(6, 0, 1, False, ("b",)), (4, 1, 1, False, ("a",))}
    assert trace.strands(solution) == {"a": "0000", "b": "111111"}
    assert solution.rank[trace.axes["b"]].tolist() == list(range(6))


def test_joined_channels_are_one_unit_wherever_they_are():
    trace = Observed(a=4, b=4, c=8)
    trace.flow.join(trace.axes["a"], trace.axes["b"], "add")
    solution = trace.solve()
    assert trace.strands(solution) == {"a": "0000", "b": "0000", "c": "11111111"}
    assert solution.unit[trace.axes["a"]].tolist() == solution.unit[trace.axes["b"]].tolist()
    assert len(np.unique(solution.unit)) == 12


def test_units_that_occur_at_different_places_are_different_strands():
    trace = Observed(a=4, b=6, c=10)
    trace.flow.join(np.concatenate([trace.axes["a"], trace.axes["b"]]), trace.axes["c"], "cat")
    solution = trace.solve()
    assert trace.strands(solution) == {"a": "0000", "b": "111111", "c": "0000111111"}
    assert sorted(solution.sizes) == [4, 6]


def test_what_is_frozen_stays_and_the_first_reason_is_told():
    trace = Observed(a=4, b=6)
    trace.constraints.freeze(trace.axes["a"], "one reason")
    trace.constraints.freeze(trace.axes["a"], "another")
    solution = trace.solve()
    assert trace.strands(solution) == {"a": "----", "b": "000000"}
    assert {solution.reasons[u] for u in solution.unit[trace.axes["a"]].tolist()} == {"one reason"}


def test_counts_that_are_tied_change_in_step():
    trace = Observed(a=4, b=6)
    trace.produce("a", "b")
    trace.constraints.tie_counts([trace.axes["a"], trace.axes["b"]])
    solution = trace.solve()
    assert solution.names == ("a",)
    assert solution.sizes == (2,)  # steps: 2 of 4 channels with 3 of 6
    assert {(s.producers, s.group, s.ratio) for s in solution.strands} == {(("a",), 0, 2), (("b",), 0, 3)}


def test_what_is_tied_to_fixed_channels_is_fixed_too_however_far():
    trace = Observed(a=4, b=8, c=16, d=5)
    trace.constraints.tie_counts([trace.axes["b"], trace.axes["c"]])
    trace.constraints.tie_counts([trace.axes["a"], trace.axes["b"]])
    trace.constraints.freeze(trace.axes["a"], "a reason")
    solution = trace.solve()
    assert trace.strands(solution) == {"a": "----", "b": "-" * 8, "c": "-" * 16, "d": "00000"}
    reason = solution.reasons[int(solution.unit[trace.axes["c"][0]])]
    tied = "their number is tied to the number of fixed channels"
    assert reason == f"{tied} ({tied} (a reason))"


def test_the_same_channels_on_both_sides_agree_by_themselves():
    trace = Observed(a=4)
    half = trace.axes["a"][:2]
    trace.constraints.freeze(half, "a reason")
    trace.constraints.tie_counts([trace.axes["a"], trace.axes["a"][::-1]])
    assert trace.strands(trace.solve()) == {"a": "--00"}


@pytest.mark.parametrize("sizes", [(4, 5), (1, 7)])
def test_counts_without_a_common_step_are_fixed(sizes):
    trace = Observed(a=sizes[0], b=sizes[1])
    trace.constraints.tie_counts(list(trace.axes.values()))
    solution = trace.solve()
    assert solution.sizes == ()
    assert set(solution.reasons.values()) == {
        "their number cannot shrink in step with the channels that they are tied to"
    }


def test_channels_of_no_tensor_are_no_group():
    trace = Observed(a=4, b=6)
    solution = trace.solve(without=["b"])
    assert solution.sizes == (4,)
    assert trace.strands(solution)["b"] == "------"


def test_one_attribute_for_two_sizes_ties_them_and_with_a_fixed_size_holds_them():
    trace = Observed(a=4, b=8)
    uses = [AttributeUse("width", 4, trace.axes["a"]), AttributeUse("width", 8, trace.axes["b"])]
    trace.constraints.attributes.extend(uses)
    solution = trace.solve()
    assert solution.sizes == (4,)
    assert not solution.conflicting_attributes
    trace.constraints.attributes.append(AttributeUse("width", 4, None))
    solution = trace.solve()
    assert solution.sizes == ()
    assert solution.conflicting_attributes == {"width"}
    assert set(solution.reasons.values()) == {"the attribute width is also the size of a dimension that cannot shrink"}


def test_channels_that_are_matched_by_position_keep_their_order():
    trace = Observed(a=4, b=6)
    trace.constraints.ordered_vectors.append(trace.axes["b"][:3])  # any of a strand hold all of it
    assert {(s.size, s.ordered) for s in trace.solve().strands} == {(4, False), (6, True)}


def test_groups_have_names_of_their_own():
    trace = Observed(a=4, b=6, c=3)
    for name in ("a", "b"):
        trace.constraints.producers.append(("layer", trace.axes[name]))
    assert trace.solve().names == ("layer", "layer:2", "c")  # "c": its tensor, as no module produces it


@pytest.mark.parametrize("others", range(6))
def test_groups_of_one_module_are_in_the_order_of_their_channels(others):
    trace = Observed(a=4, b=6, c=8, **{f"d{i}": 2 for i in range(others)})
    channels = np.concatenate([trace.axes[name] for name in "abc"])
    trace.constraints.producers.append(("qkv", channels))
    solution = trace.solve()
    assert solution.names[:3] == ("qkv", "qkv:2", "qkv:3")
    assert solution.sizes[:3] == (4, 6, 8)


def test_equal_observations_have_equal_solutions():
    def solution():
        trace = Observed(a=4, b=6, c=10)
        trace.produce("a", "b")
        trace.flow.join(np.concatenate([trace.axes["a"], trace.axes["b"]]), trace.axes["c"], "cat")
        return trace.solve()

    one, other = solution(), solution()
    assert (one.names, one.sizes, one.strands, one.reasons) == (other.names, other.sizes, other.strands, other.reasons)
    assert np.array_equal(one.strand, other.strand)
    assert np.array_equal(one.rank, other.rank)


def test_a_group_that_the_model_itself_produces_has_the_name_of_a_tensor():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.rand(8, 3, 1, 1)), nn.Parameter(torch.rand(12, 8, 1, 1))
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            x = F.conv2d(F.conv2d(x, self.first).relu(), self.second).relu()
            return self.head(x.mean((2, 3)))

    assert convert(Functional(), torch.zeros(1, 3, 4, 4)).space.names == ("first", "second")
