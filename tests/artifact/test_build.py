"""Slim models from specs: heads, pooling and images of other sizes than those of the spec's base."""

import pytest
import torch
from helpers.specs import RESNET, RESNET_ATTRIBUTES, changed, make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_autoslim.artifact.build import build_slim, find_pool_type
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError


@pytest.fixture(scope="module")
def spec():
    return make_spec("resnet10t", RESNET, RESNET_ATTRIBUTES)


@pytest.mark.parametrize("native", [None, 0, 12])
@pytest.mark.parametrize("wanted", [0, 7])
def test_heads_come_and_go_whatever_the_base_had(spec, native, wanted):
    if native is not None:
        spec = spec.replace(base_args={"num_classes": native})
    if native == 0:
        data = spec.to_dict()
        data["sizes"].pop("fc.weight")
        data["attributes"].pop("fc.in_features")
        spec = Spec.parse(data)
    model = build_slim(spec, num_classes=wanted).eval()
    assert model.num_classes == wanted
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, wanted or 48)


def test_pooling_can_change(spec):
    model = build_slim(spec, global_pool="catavgmax").eval()
    assert find_pool_type(model) == "catavgmax"
    assert model.fc.weight.shape == (1000, 96)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_torchvision_heads_are_refused_by_name():
    spec = make_spec("torchvision/squeezenet1_1", {}, num_classes=0)
    with pytest.raises(ArtifactError, match="got num_classes=3 without a head, which it cannot take"):
        build_slim(spec, num_classes=3)
    with pytest.raises(ArtifactError, match="base 'torchvision/squeezenet1_1': got global_pool='max', which it cannot"):
        build_slim(spec, global_pool="max")


def test_arguments_of_the_constructor_take_precedence_over_those_of_the_spec():
    model = build_slim(make_spec("resnet10t", {}, drop_rate=0.1), drop_rate=0.3)
    assert model.drop_rate == 0.3
    assert model.autoslim.base_args == {"drop_rate": 0.1}


NO_BASE = [
    (["base_args", "num_classes"], "ten", "spec 'base_args.num_classes': .* needed: an integer, 0 for no head"),
    (["base_args", "num_classes"], -1, "spec 'base_args.num_classes'"),
    (["base_args", "x"], 1, "cannot be created with"),
    (["base_args", "name"], "x", "cannot be created with"),
    (["base_args", "function"], "x", "cannot be created with"),
    (["base_args", "model_name"], "x", "cannot be created with"),
    (["base"], "resnet10t.nonsense", "Invalid pretrained tag"),
    (["base"], None, "spec 'base': got None; needed: the name that creates the base; export with base="),
]


@pytest.mark.parametrize(("path", "value", "message"), NO_BASE)
def test_specs_whose_base_cannot_be_built_are_refused(spec, path, value, message):
    with pytest.raises(ArtifactError, match=message):
        build_slim(Spec.parse(changed(spec.to_dict(), path, value)))


def test_heads_that_cannot_be_are_refused(spec):
    for value in (-1, "ten", True, 2.5):
        with pytest.raises(ArtifactError, match=r"num_classes: got .*; needed: an integer, 0 for no head"):
            build_slim(spec, num_classes=value)


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
JUNK = st.recursive(ATOMS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(["num_classes", "in_chans", "global_pool", "drop_rate", "x"]), JUNK, max_size=2),
    JUNK,
)
def test_hostile_bases_raise_only_artifact_errors(base_args, base):
    data = {**Spec().to_dict(), "base": base, "base_args": base_args}
    with pytest.raises(ArtifactError):
        build_slim(Spec.parse(data))
    with pytest.raises(ArtifactError):
        build_slim(Spec.parse({**data, "base": "torchvision/alexnet", "base_args": {**base_args, "x": 1}}))
