"""A folder from a stranger describes a smaller model, and does nothing else."""

import json
import shutil
from collections import OrderedDict

import pytest
import timm
import torch
from helpers.specs import make_spec

from timm_autoslim import check_folder
from timm_autoslim.artifact.build import build_slim
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.folder import copy_state, read_header, write_files
from timm_autoslim.errors import ArtifactError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    narrow = {"blocks.0.mlp.fc1": (100, None), "blocks.0.mlp.fc2": (None, 100)}
    return export(build_slim(make_spec("test_vit", narrow)), tmp_path_factory.mktemp("hostile") / "out")


def load(exported, folder, path, value):
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    target = config
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


ARGS = ("model_args", "spec", "base_args")
REFUSED = [
    (("model_args", "checkpoint_path"), "other.pth", "model_args.checkpoint_path|got multiple"),
    (("model_args", "weights"), "DEFAULT", "model_args.weights"),
    (("model_args", "pruned"), True, "model_args.pruned"),
    (("model_args", "spec", "sizes", "x"), nested(300), "ascending runs of its channels"),
    (("model_args", "spec", "attributes", "x"), nested(300), "a list of positive integers"),
    ((*ARGS, "x"), nested(300), "at most 1000 items and 8 levels"),
    ((*ARGS, "embed_dim"), 960_000, "arguments that build at most"),
    pytest.param((*ARGS, "depth"), 900_000, "arguments that build at most", marks=pytest.mark.slow),
    ((*ARGS, "num_classes"), 1_000_000_000, "a number of at most"),
    (("model_args", "spec", "attributes", "blocks.0.norm1.eps"), 1e300, r"n \*\* -0\.5 of a head"),
    (("num_classes",), 1_000_000_000_000, "an integer from 0 to 1000000"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_what_is_no_smaller_model_is_refused(path, value, message, exported, tmp_path):
    with pytest.raises(ArtifactError, match=message):
        load(exported, tmp_path / "out", path, value)


def test_a_folder_of_the_old_format_must_be_exported_again(exported, tmp_path):
    config = json.loads((exported / "config.json").read_text())
    model_args = {"recipe": config["model_args"]["spec"]}
    message = r"the format of before the first release \('recipe'\); needed: .*; export the model again"
    with pytest.raises(ArtifactError, match=message):
        load(exported, tmp_path / "out", ("model_args",), model_args)
    with pytest.raises(ArtifactError, match=message):
        check_folder(tmp_path / "out")


def test_files_that_are_missing_or_too_large_are_refused(exported, tmp_path):
    check_folder(exported)
    with pytest.raises(
        ArtifactError, match=r"config\.json: got a file that cannot be read .*; needed: a regular file;"
    ):
        check_folder(tmp_path)
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(ArtifactError, match=r"config\.json: got 16,777,217 bytes; needed: at most 16,777,216"):
        check_folder(tmp_path / "out")
    shutil.copy(exported / "config.json", tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: got .*; needed: a regular file of safetensors"):
        check_folder(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="got no regular file; needed: a regular file"):
        check_folder(tmp_path / "out")


SOURCES = {
    "url": "file:///nowhere/weights.pth",
    "state_dict": {"fc.weight": [1]},
    "custom_load": True,
    "hf_hub_filename": "other.bin",
}


@pytest.mark.parametrize("key", SOURCES)
def test_weights_come_from_the_folder_alone(key, exported, tmp_path):
    model = load(exported, tmp_path / "out", ("pretrained_cfg", key), SOURCES[key])
    unchanged = timm.create_model(f"local-dir:{exported}", pretrained=True)
    state, expected = OrderedDict(model.state_dict()), unchanged.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].equal(expected[name]) for name in expected)


def test_a_users_own_weights_open_no_other_file(exported, tmp_path):
    """timm's scripts put --pretrained-path in place of the folder: its config.json is then no longer at hand."""
    resolve = getattr(timm.models, "resolve_model_input_args", None)
    if resolve is None:
        pytest.skip("this timm hands the folder on")
    users, trap = tmp_path / "users.safetensors", tmp_path / "out" / "trap.pth"
    shutil.copy(exported / "model.safetensors", users)
    shutil.copytree(exported, tmp_path / "out")
    trap.write_bytes(b"a pickle")
    config = json.loads((exported / "config.json").read_text())
    for key, value in {"checkpoint_path": str(trap), "pretrained_cfg_overlay": {"file": str(trap)}}.items():
        hostile = {**config, "model_args": {**config["model_args"], key: value}}
        (tmp_path / "out" / "config.json").write_text(json.dumps(hostile))
        args = resolve(f"local-dir:{tmp_path / 'out'}", pretrained=True, pretrained_cfg_overlay={"file": str(users)})
        with pytest.raises(ArtifactError, match=f"model_args.{key}"):
            timm.create_model(**args)


def test_tied_weights_are_written_under_both_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    write_files(tmp_path, copy_state(model), {"kind": "a test"})
    assert read_header(tmp_path / "model.safetensors").shapes["1.weight"] == (2, 2)
    assert json.loads((tmp_path / "config.json").read_text()) == {"kind": "a test"}


def test_a_state_that_safetensors_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="a state that safetensors cannot hold"):
        write_files(tmp_path, {"weight": torch.zeros(2, 2).to_sparse()}, {})
    assert list(tmp_path.iterdir()) == []
