"""Specs on their bases: what fits is applied, what does not is named and changes nothing."""

import pytest
import torch
from helpers.comparisons import same, state
from helpers.specs import RESNET, RESNET_ATTRIBUTES, make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from timm_autoslim.artifact.apply import apply_spec
from timm_autoslim.artifact.bases import create_base
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError


def test_sizes_keep_the_first_channels():
    spec = make_spec("resnet10t", RESNET, RESNET_ATTRIBUTES)
    base = create_base("resnet10t").eval()
    full = state(base)
    slim = apply_spec(base, spec)
    assert slim is base
    assert slim.autoslim is spec
    for name, tensor in slim.state_dict().items():
        sizes = spec.sizes.get(name, [None] * tensor.ndim)
        assert torch.equal(tensor, full[name][tuple(slice(size) for size in sizes)]), name
    assert isinstance(slim.layer4[0].conv2.weight, nn.Parameter)
    assert slim.layer4[0].conv2.weight.requires_grad
    assert slim.feature_info[4]["num_chs"] == slim.num_features == slim.fc.in_features == 48
    assert slim(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.table = torch.arange(8.0)
        self.norm = nn.LayerNorm(8)
        self.splits = [4, 4]
        self.scale = 0.5
        self.factor, self.drop = 3.0, 0.5
        self.flag = True


@pytest.mark.parametrize("names", [["first.weight"], ["second.weight"], ["first.weight", "second.weight"]])
def test_tied_parameters_stay_tied(names):
    model = apply_spec(Tied(), Spec(sizes={name: [3, None] for name in names}))
    assert model.first.weight is model.second.weight
    assert model.first.weight.shape == (3, 8)


def test_tensors_that_are_no_parameters_and_attributes_of_every_kind():
    attributes = {"norm.normalized_shape": [5], "splits": [2, 3], "scale": 3**-0.5}
    model = apply_spec(Tied(), Spec(sizes={"table": [5]}, attributes=attributes))
    assert model.table.tolist() == [0, 1, 2, 3, 4]
    assert (model.norm.normalized_shape, model.splits, model.scale) == ((5,), [2, 3], 3**-0.5)
    model = apply_spec(Tied(), Spec(attributes={"norm.normalized_shape.0": 6, "splits.1": 1}))
    assert (model.norm.normalized_shape, model.splits) == ((6,), [4, 1])


def test_runs_keep_channels_from_anywhere():
    model = apply_spec(Tied(), Spec(sizes={"table": [[[1, 2], [7, 1]]]}))
    assert model.table.tolist() == [1, 2, 7]


NO_FIT = [
    ({"first.weight": [9, None]}, {}, r"spec 'sizes.first.weight': got \(9, None\); needed: .* in \(8, 8\)"),
    ({"first.weight": [9, None]}, {}, "integer from 1 to the size"),
    ({"first.weight": [[[0, 9]], None]}, {}, "or runs within it"),
    ({"first.weight": [[[0, 2], [7, 2]], None]}, {}, "or runs within it"),
    ({"first.weight": [2]}, {}, "a list of 2 sizes"),
    ({"first.weight": []}, {}, "a list of 2 sizes"),
    ({"first.wait": [2, None]}, {}, "a tensor of Tied, which has none of this name"),
    ({"scale": [2]}, {}, "which has none of this name"),
    ({"first.weight": [2, None], "second.weight": [3, None]}, {}, "the sizes of first.weight, the same tensor"),
    ({}, {"first.in_features": 9}, r"spec 'attributes.first.in_features': got 9; needed: an integer from 1 to 8"),
    ({}, {"first.in_features": 4.0}, "from 1 to 8"),
    ({}, {"first.in_features": [4]}, "from 1 to 8"),
    ({}, {"first.new": 4}, "which has none under this path"),
    ({}, {"flag": 1}, "which has none under this path"),
    ({}, {"training": 1}, "which has none under this path"),
    ({}, {"_modules.first.in_features": 4}, "which has none under this path"),
    ({}, {"first.__class__": 4}, "which has none under this path"),
    ({}, {"table": 4}, "which has none under this path"),
    ({}, {"splits.2": 1}, "which has none under this path"),
    ({}, {"splits.-1": 1}, "which has none under this path"),
    ({}, {"": 1}, "which has none under this path"),
    ({}, {"splits": [1]}, r"2 positive integers, none above \(4, 4\)"),
    ({}, {"splits": [1, 5]}, "none above"),
    ({}, {"norm.normalized_shape": 4}, "none above"),
    *(
        ({}, {"scale": value}, r"n \*\* -0.5 of a head of n channels, where the base has such a scale of more, not 0.5")
        for value in (-0.5, 1, 0.0, 1e-200, 1e5, 1.5, 0.6, 5**-0.5)
    ),
    ({}, {"factor": 2.0}, "not 3.0"),  # no scale of attention scores
    ({}, {"drop": 1.0}, "not 0.5"),
]


@pytest.mark.parametrize(("sizes", "attributes", "message"), NO_FIT)
def test_what_does_not_fit_the_base_is_named_and_changes_nothing(sizes, attributes, message):
    model = Tied()
    before, weight = state(model), model.first.weight
    spec = Spec(sizes={"table": [4], **sizes}, attributes={"second.in_features": 4, **attributes})
    with pytest.raises(ArtifactError, match=message):
        apply_spec(model, spec)
    assert same(before, state(model))
    assert model.first.weight is weight
    assert len(model.table) == 8
    assert model.second.in_features == 8
    assert not hasattr(model, "autoslim")


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
JUNK = st.recursive(ATOMS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))
NAMES = st.sampled_from(
    ["first.weight", "second.weight", "table", "norm.weight", "first.in_features", "splits", "splits.0", "scale",
     "flag", "norm.normalized_shape", "norm.normalized_shape.0", "_modules", "forward", "first",
     "training", "..", "first."]
) | st.text(max_size=8)  # fmt: skip
SIZES = st.lists(st.none() | st.integers(-2, 10), max_size=3) | JUNK
VALUES = st.integers(-2, 10) | st.lists(st.integers(-1, 9), max_size=3) | JUNK
FIELDS = ["base", "base_args", "sizes", "attributes", "widths"]


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(NAMES, SIZES, max_size=3),
    st.dictionaries(NAMES, VALUES, max_size=3),
    st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=1),
)
def test_hostile_specs_either_fit_or_raise_only_artifact_errors(sizes, attributes, junk):
    model = Tied()
    before, numbers = state(model), dict(vars(model.first), **vars(model.norm))
    data = {**Spec().to_dict(), "sizes": sizes, "attributes": attributes, **junk}
    try:
        apply_spec(model, Spec.parse(data))
    except ArtifactError:
        assert same(before, state(model))
        assert numbers == dict(vars(model.first), **vars(model.norm))
    else:
        for name, tensor in model.state_dict().items():
            assert all(0 < new <= old for new, old in zip(tensor.shape, before[name].shape, strict=True))
        assert model.first.weight is model.second.weight
