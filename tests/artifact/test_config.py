"""config.json: parsed once, what it says of weights elsewhere is not followed, and what it may not say is refused."""

import json

import pytest
from timm.models import PretrainedCfg

from timm_autoslim.artifact.config import Config, parse_data_settings, parse_settings
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError

CONFIG = Config(
    Spec(base="resnet10t", base_args={"act_layer": "silu"}, sizes={"fc.weight": [None, 48]}),
    PretrainedCfg(input_size=(3, 96, 96), num_classes=7, first_conv="conv1.0", classifier="fc", label_names=("a", "b")),
    parse_settings({"global_pool": "max", "taps": [["layer1", 64, 4]]}),
)


def content(**changes):
    return {**json.loads(json.dumps(CONFIG.to_dict(48, "max"))), **changes}


def test_a_config_goes_through_json_and_comes_back_equal():
    assert Config.parse(content()) == CONFIG
    assert content()["model_args"] == {
        "spec": CONFIG.spec.to_dict(),
        "global_pool": "max",
        "taps": [["layer1", 64, 4]],
    }
    assert "global_pool" not in CONFIG.to_dict(48, None)


def test_settings_are_immutable():
    with pytest.raises(TypeError):
        CONFIG.settings["global_pool"] = "avg"
    assert CONFIG.settings["taps"] == (("layer1", 64, 4),)


def test_the_top_of_the_file_has_precedence_over_the_data_settings():
    config = Config.parse(content(num_classes=3, label_names=["x"]))
    assert (config.data.num_classes, config.data.label_names) == (3, ("x",))


NOT_OURS = [
    ([], r"here: got architecture \[\]; needed: 'autoslim', an exported model's; nothing was loaded"),
    (None, "architecture None"),
    (content(architecture="resnet10t"), "got architecture 'resnet10t'; needed: 'autoslim'"),
    (content(model_args=None), "got model_args None; needed: a mapping that holds the spec"),
    (content(model_args={}), "a mapping that holds the spec"),
    (content(model_args={"spec": {}}), "a mapping with exactly"),
    (content(pretrained_cfg=[]), r"got pretrained_cfg \[\]; needed: a mapping of data settings"),
    (
        content(model_args={"recipe": CONFIG.spec.to_dict()}),
        r"here: got the format of before the first release \('recipe'\); needed: .*; export the model again",
    ),
]


@pytest.mark.parametrize(("data", "message"), NOT_OURS)
def test_what_is_no_config_of_an_exported_model_is_refused(data, message):
    with pytest.raises(ArtifactError, match=message):
        Config.parse(data, "here")


BAD_DATA = {
    "input_size": [[3, 96], [3, 96, 0], "3", [3, 96, True], [3, 96, 10**7]],
    "crop_pct": [0, -1, True, "x", 1e9],
    "mean": [[], ["x"], 0.5, [1e9]],
    "first_conv": [1, [1], ["x"] * 1001],
    "num_classes": [-1, True, 1.5, 10**7],
    "fixed_input_size": [1],
    "license": [1, "x" * 200_000],
    "label_names": [1, [1], {"a": 1}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_DATA.items() for value in values])
def test_data_settings_out_of_bounds_are_named(key, value):
    with pytest.raises(ArtifactError, match=f"pretrained_cfg '{key}': got .*; needed: .*; export the model again"):
        parse_data_settings({key: value})


def test_data_settings_name_no_weights():
    elsewhere = {"url": "x", "state_dict": {}, "custom_load": True, "hf_hub_filename": "x"}
    assert parse_data_settings({**elsewhere, "unknown": 1}) == PretrainedCfg()


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "device", "model_cfg", "scriptable", "pruned"])
def test_arguments_that_do_not_shape_the_model_are_refused(key):
    with pytest.raises(ArtifactError, match=f"model_args.{key}: got 'x'; needed: only arguments that shape the model"):
        parse_settings({key: "x"})


@pytest.mark.parametrize(("key", "values"), {"in_chans": [0, "3", None, [3]], "img_size": [0, [], [1, 2, 3]]}.items())
def test_sizes_are_positive_integers(key, values):
    for value in values:
        with pytest.raises(ArtifactError, match=f"model_args.{key}: got .*; needed: .*positive integer"):
            parse_settings({key: value})
