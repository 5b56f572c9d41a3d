"""The settings of a run are kept once its work has begun."""

import pytest
import yaml

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.settings import (
    FREE,
    check_same,
    describe_left_out,
    find_left_out,
    list_remembered,
    write_settings,
)


def test_settings_may_change_until_the_work_has_begun(tmp_path):
    path = tmp_path / "settings.yaml"
    assert not check_same(path, {"lr": 1}, begun=False)
    write_settings(path, {"lr": 1})
    assert not check_same(path, {"lr": 2}, begun=False)
    write_settings(path, {"lr": 2})
    assert yaml.safe_load(path.read_text()) == {"lr": 2}
    with pytest.raises(ConfigError, match=r"was begun with other settings: --lr was 2, and is 3\. To go on"):
        check_same(path, {"lr": 3}, begun=True)
    assert check_same(path, {"lr": 2}, begun=True)


def test_what_has_changed_is_told_in_the_words_of_the_flags(tmp_path):
    path = tmp_path / "settings.yaml"
    write_settings(path, {"val_split": None, "weights_sha256": "a"})
    with pytest.raises(ConfigError, match=r": --val-split was not given, and is x; the weights .* are other ones\. To"):
        check_same(path, {"val_split": "x", "weights_sha256": "b"}, begun=True)
    with pytest.raises(ConfigError, match=r"settings: the weights \(--initial-checkpoint or --model\) are other ones"):
        check_same(path, {"weights_sha256": "b", "val_split": None}, begun=True)


def test_flags_that_are_left_out_are_those_of_before_and_are_told(tmp_path):
    path = tmp_path / "flags.yaml"
    assert find_left_out(path, {"lr"}) == {}
    before = {"lr": 1, "mean": [0.5, 0.4], "amp": True, "onnx": False, "budgets": ["macs<=50% and params<=2M"],
              "model_kwargs": {"drop_rate": 0.1}, "initial_checkpoint": "a file", "pretrained": False}  # fmt: skip
    write_settings(path, before)
    assert find_left_out(path, ()) == before
    left_out = find_left_out(path, {"lr", "pretrained"})  # which replaces the file
    assert left_out.keys() == before.keys() - {"lr", "pretrained", "initial_checkpoint"}
    assert describe_left_out(left_out) == (
        "Left out, and as before: --mean 0.5 0.4 --amp --no-onnx --budgets 'macs<=50% and params<=2M' "
        "--model-kwargs drop_rate=0.1."
    )
    assert describe_left_out({}) == ""


@pytest.mark.parametrize(
    "group",
    [("pretrained", "initial_checkpoint"), ("data_dir", "dataset"), ("model_kwargs", "drop"),
     ("in_chans", "input_size"), ("img_size", "input_size")],
)  # fmt: skip
def test_flags_that_stand_for_each_other_are_given_together(group, tmp_path):
    first, second = group
    write_settings(tmp_path / "flags.yaml", {first: 1})
    assert find_left_out(tmp_path / "flags.yaml", {second}) == {}


def test_every_flag_of_slim_that_changes_the_networks_is_remembered(tmp_path):
    """None that is compared with the run of before may be left out and be its default."""
    args = parse_args("slim", None, ["DATA", "--model", "resnet10t", "--initial-checkpoint", "FILE"])
    assert {name for name in vars(args) if name not in FREE} <= list_remembered(args).keys()
    assert {"data_dir", "initial_checkpoint", "model", "budgets"} <= list_remembered(args).keys()
    assert not {"output", "experiment", "config", "resume", "device"} & list_remembered(args).keys()
