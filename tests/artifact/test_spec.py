"""Specs: parsed once, immutable, equal by value; a value that no spec may have is refused by name."""

import copy
import json
import math
import pickle

import pytest
import timm
import torch
from helpers.specs import RESNET, RESNET_ATTRIBUTES, changed, make_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from timm_autoslim.artifact.spec import Spec, derive_spec, freeze, thaw
from timm_autoslim.errors import ArtifactError

NESTED = [1, 2.5, None, True, "text", {"deep": [[1], {"x": "y"}]}]


@pytest.fixture(scope="module")
def spec():
    return make_spec("resnet10t", RESNET, RESNET_ATTRIBUTES, drop_rate=0.1)


# ---- values


def test_a_spec_goes_through_json_and_comes_back_equal(spec):
    full = spec.replace(
        base_args={"args": NESTED},
        sizes={"table": [[[0, 3], [8, 5]], None, 4]},
        attributes={"a": 2, "b": 0.5, "c": [3]},
    )
    for value in (spec, full, Spec()):
        data = json.loads(json.dumps(value.to_dict(), allow_nan=False))
        assert data == value.to_dict()
        assert Spec.parse(data) == value
        assert Spec.parse(data).to_dict() == data
    assert list(full.to_dict()) == ["format", "base", "base_args", "sizes", "attributes", "widths"]
    assert full.sizes["table"] == (((0, 3), (8, 5)), None, 4)
    assert full.attributes["c"] == (3,)
    assert full.copy_arguments() == {"args": NESTED}
    assert Spec.parse(full) is full


def test_equality_is_by_value(spec):
    assert spec == make_spec("resnet10t", RESNET, RESNET_ATTRIBUTES, drop_rate=0.1)
    for field, value in {"base": "resnet18", "base_args": {}, "sizes": {}, "attributes": {}, "widths": {}}.items():
        assert spec.replace(**{field: value}) != spec
    assert spec.replace(base="resnet18").sizes == spec.sizes


def test_nothing_in_a_spec_can_be_changed(spec):
    value = spec.replace(base_args={"args": NESTED})
    with pytest.raises(AttributeError):
        value.base = "resnet18"
    for mapping in (value.base_args, value.sizes, value.attributes, value.widths, value.base_args["args"][5]):
        with pytest.raises(TypeError):
            mapping["x"] = 1
    arguments = value.copy_arguments()
    arguments["args"][5]["deep"].append(1)
    value.to_dict()["sizes"].clear()
    assert value.copy_arguments() == {"args": NESTED}
    assert value.sizes == spec.sizes
    data = spec.to_dict()
    parsed = Spec.parse(data)
    data["sizes"].clear()
    assert parsed == spec


def test_specs_are_copied_and_pickled_with_their_models(spec):
    model = nn.Linear(2, 2)
    model.autoslim = spec
    assert copy.deepcopy(model).autoslim is spec
    assert copy.copy(spec) == spec
    assert pickle.loads(pickle.dumps(model)).autoslim == spec


def test_a_spec_prints_in_one_line(spec):
    assert repr(spec) == "Spec(base='resnet10t', base_args={'drop_rate': 0.1}, 17 sizes, 11 attributes, 5 widths)"


def test_freeze_keeps_content_and_thaw_gives_it_back():
    frozen = freeze("x", {"args": (1, [2, {"a": ()}])})
    assert thaw(frozen) == {"args": [1, [2, {"a": []}]]}
    with pytest.raises(TypeError):
        frozen["args"][1][1]["a"] = 2


# ---- of a model


def test_the_spec_of_a_model_knows_its_base():
    model = timm.create_model("resnet10t", num_classes=3)
    assert derive_spec(model).base == "resnet10t"
    assert derive_spec(model, base_args={"num_classes": 3, "drop_rate": 0.1}).base_args["drop_rate"] == 0.1
    assert derive_spec(nn.Linear(2, 2)) == Spec()
    slim = nn.Linear(2, 2)
    slim.autoslim = Spec(base="resnet18", base_args={"num_classes": 3}, sizes={"weight": [1, None]})
    assert derive_spec(slim) == slim.autoslim
    assert derive_spec(slim, base_args={"a": [1]}).base_args == {"num_classes": 3, "a": (1,)}
    assert derive_spec(slim, base="resnet34").base_args == {}
    slim.autoslim = "something else"
    assert derive_spec(slim) == Spec()


def test_what_timm_says_of_its_arguments_is_taken_as_far_as_json_holds_it():
    model = nn.Linear(2, 2)
    model._model_args = {"num_classes": 3, "act_layer": nn.SiLU, "pretrained": True, "taps": [], "x": None, "y": (1, 2)}
    assert derive_spec(model, base="resnet10t").base_args == {"num_classes": 3, "y": (1, 2)}


def test_base_args_that_json_cannot_hold_are_refused_at_once():
    with pytest.raises(ArtifactError, match=r"spec 'base_args.act_layer': got <class .*SiLU.*; needed: JSON data"):
        derive_spec(nn.Linear(2, 2), "resnet10t", {"act_layer": nn.SiLU})
    with pytest.raises(ArtifactError, match=r"base_args: got \[\]; needed: a mapping"):
        derive_spec(nn.Linear(2, 2), "resnet10t", [])


# ---- what is refused

BAD_VALUES = [
    (["format"], 2, r"spec 'format': got 2; needed: 1 \(a newer one needs a newer timm-autoslim\)"),
    (["format"], True, "spec 'format'"),
    (["base"], 7, "spec 'base': got 7; needed: a name"),
    (["base"], "x" * 1001, "spec 'base'"),
    (["extra"], 1, "a mapping with exactly format, base, base_args, sizes, attributes, widths"),
    (["sizes"], [], "spec 'sizes'.*a mapping from names"),
    (["attributes"], {1: 2}, "spec 'attributes'.*a mapping from names"),
    (["widths", "layer1.0.conv1"], 0, "spec 'widths.layer1.0.conv1': got 0; needed: a positive integer"),
    (["widths", "layer1.0.conv1"], True, "spec 'widths.layer1.0.conv1': got True; needed: a positive integer"),
    (["base_args", "pretrained"], True, "spec 'base_args.pretrained': got True; needed: only arguments that shape"),
    (["base_args", "checkpoint_path"], "x", "spec 'base_args.checkpoint_path'"),
    (["base_args", "weights"], "DEFAULT", "spec 'base_args.weights'"),
    (["base_args", "spec"], {}, "spec 'base_args.spec'"),
    (["base_args", "num_classes"], 10**9, "spec 'base_args.num_classes': .* a number of at most 1000000"),
    (["base_args", "x"], float("nan"), "a number of at most"),
    (["base_args", "x"], object(), "JSON data"),
    (["base_args", "x"], "x" * 1001, "JSON data of at most 1000 items"),
    (["base_args", "x"], [0] * 1001, "JSON data of at most 1000 items"),
    (["base_args", "x"], [[[[[[[[[[]]]]]]]]]], "JSON data of at most 1000 items and 8 levels"),
    (["base_args", "x"], {(1, 2): 3}, "a text key"),
    (["base_args", "x"], {1: 3}, "a text key"),
    *(
        (["sizes", "fc.weight"], [value, None], r"for each axis None, a positive integer, or ascending runs")
        for value in (0, -1, True, 2.0, "2", [], [[4, 2], [2, 2]], [[0, 2], [1, 2]], [[-1, 2]], [[0, 0]], [[0, 2, 1]],
                      [[0, True]], [7], {})
    ),
    (["sizes", "fc.weight"], "22", "spec 'sizes.fc.weight': got '22'; needed: a list with a size for each axis"),
    (["sizes", "fc.weight"], None, "a list with a size for each axis"),
    *(
        (["attributes", "fc.in_features"], value, "a positive integer, a finite number, or a list of positive integers")
        for value in (0, -3, True, None, "4", [], [True], [1, 0], [1.0], [[1]], {}, math.inf, math.nan)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), BAD_VALUES)
def test_a_value_that_no_spec_may_have_is_refused(spec, path, value, message):
    with pytest.raises(ArtifactError, match=message):
        Spec.parse(changed(spec.to_dict(), path, value))


@pytest.mark.parametrize("data", [None, [], "text", {}, 7, {"format": 1}])
def test_a_spec_is_a_mapping(data):
    with pytest.raises(ArtifactError, match="a mapping with exactly"):
        Spec.parse(data)


def test_a_spec_without_a_base_says_so():
    with pytest.raises(ArtifactError, match="spec 'base': got None; needed: the name that creates the base; export wi"):
        Spec().require_base()


def test_names_of_any_length_and_letters_make_short_messages():
    name = "\ud800" + "x" * 10**6
    with pytest.raises(ArtifactError) as caught:
        Spec(widths={name: 0})
    assert len(str(caught.value).encode()) < 1000


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3)
JUNK = st.recursive(ATOMS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))
FIELDS = ["format", "base", "base_args", "sizes", "attributes", "widths"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=2), st.sampled_from(FIELDS[2:]), JUNK)
def test_junk_is_parsed_or_refused_with_one_kind_of_error(junk, field, value):
    data = {**Spec().to_dict(), field: {"name": value}, **junk}
    try:
        spec = Spec.parse(data)
    except ArtifactError:
        return
    assert Spec.parse(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec


def test_torchscript_takes_a_model_with_a_spec():
    model = nn.Linear(2, 2)
    model.autoslim = Spec(base="resnet10t", sizes={"weight": [1, None]})
    assert torch.jit.script(model)(torch.zeros(1, 2)).shape == (1, 2)
