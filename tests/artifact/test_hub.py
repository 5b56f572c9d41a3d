"""The Hub without a network: loading from its local cache, and pushing through timm's own function."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from helpers.comparisons import same, state
from helpers.exported import image, load, needs_hub, slim
from helpers.marks import slow_but
from safetensors.torch import load_file

import timm_autoslim
from timm_autoslim.artifact.export import export
from timm_autoslim.errors import ArtifactError

ROOT = Path(timm_autoslim.__file__).parent.parent
pytestmark = needs_hub


BASES = ["resnet10t", "torchvision/squeezenet1_1"]


@pytest.fixture(scope="module", params=slow_but(BASES[1:], BASES))
def exported(request, tmp_path_factory):
    model = slim(request.param)
    return model, export(model, tmp_path_factory.mktemp("hub") / "out")


def cache(folder, files, at):
    """The Hub's own cache with one commit of `someone/slim`, as a download leaves it: links to blobs."""
    repo, commit = at / "models--someone--slim", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / commit).mkdir(parents=True)
    for number, name in enumerate(files):
        shutil.copy(folder / name, repo / "blobs" / str(number))
        (repo / "snapshots" / commit / name).symlink_to(Path("../../blobs") / str(number))
    return at


# Every way out is barred: what loads now came from the cache.
LOADER = """
import socket, sys
def barred(*args, **kwargs):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = barred
import timm, timm_autoslim
from safetensors.torch import save_file
model = timm.create_model("hf-hub:someone/slim", pretrained=True)
save_file(model.state_dict(), sys.argv[1])
seven = timm.create_model("hf-hub:someone/slim", pretrained=True, num_classes=7, in_chans=1)
print(model.num_classes, seven.num_classes, model.pretrained_cfg["input_size"])
"""


def offline(code, at, *args):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(at), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_cached_repository_loads_without_a_network(exported, tmp_path):
    model, folder = exported
    done = offline(LOADER, cache(folder, ["config.json", "model.safetensors"], tmp_path / "hub"), tmp_path / "w")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 2)[:2] == [str(model.num_classes), "7"]
    assert same(state(model), load_file(tmp_path / "w"))


# Twice as timm's train.py and validate.py create models: with --pretrained-path, and with what config.json says.
CREATOR = (
    LOADER.partition("import timm, timm_autoslim")[0]
    + """
sys.path.append(sys.argv[1])
import argparse, timm_autoslim, torch
from script_tools import create
args = argparse.Namespace(model="hf-hub:someone/slim", in_chans=None, img_size=None, input_size=None)
for number, overlay in enumerate(({"file": sys.argv[2], "num_classes": -1}, None)):
    model = create(args, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.save(model.state_dict(), f"{sys.argv[3]}{number}")
"""
)


@pytest.mark.slow
def test_a_users_file_takes_the_place_of_a_repositorys_weights_and_a_strangers_does_not(exported, tmp_path):
    model, folder = exported
    copied, (mine, theirs) = tmp_path / "copy", (tmp_path / "mine.pth", tmp_path / "theirs.pth")
    shutil.copytree(folder, copied)
    for number, path in enumerate((mine, theirs), start=1):
        torch.save({name: tensor + number for name, tensor in model.state_dict().items()}, path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"]["file"] = str(theirs)
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    at = cache(copied, ["config.json", "model.safetensors"], tmp_path / "hub")
    done = offline(CREATOR, at, ROOT / "tests" / "helpers" / "timm_scripts", mine, tmp_path / "w")
    assert done.returncode == 0, done.stderr
    of_user, of_repository = (torch.load(tmp_path / f"w{number}") for number in (0, 1))
    assert same(state(model), of_repository)
    head = model.pretrained_cfg["classifier"]  # with another number of classes in the settings, timm makes a new one
    assert of_user.keys() == of_repository.keys()
    assert all(torch.equal(t, of_repository[k] + 1) for k, t in of_user.items() if not k.startswith(head))


@pytest.mark.slow
def test_a_repository_of_pickles_is_not_read(exported, tmp_path):
    model, folder = exported
    if isinstance(model, torchvision.models.SqueezeNet):
        pytest.skip("one base is enough: the weights are found before the model is built")
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    torch.save(load_file(folder / "model.safetensors"), copied / "pytorch_model.bin")
    at = cache(copied, ["config.json", "pytorch_model.bin"], tmp_path / "hub")
    done = offline(LOADER, at, tmp_path / "w")
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert not (tmp_path / "w").exists()


class FakeApi:
    """What timm asks of huggingface_hub.HfApi; uploads go to a folder."""

    uploads = Path()

    def __init__(self, **kwargs):
        assert kwargs["library_name"] == "timm"

    def create_repo(self, repo_id, private=False, exist_ok=False):
        assert private
        assert exist_ok
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, **kwargs):
        return False

    def upload_folder(self, repo_id, folder_path, commit_message, **kwargs):
        assert commit_message == "slim"
        shutil.copytree(folder_path, self.uploads / repo_id)


def test_what_timm_pushes_is_the_exported_model(exported, tmp_path, monkeypatch):
    model, folder = exported
    if not hasattr(timm.models._hub, "HfApi"):
        pytest.skip("this timm calls huggingface_hub in another way")
    monkeypatch.setattr("timm.models._hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "uploads", tmp_path)
    name = timm_autoslim.push(folder, "me/slim", card={"top-1": 71.5}, private=True, commit_message="slim")
    assert name == "hf-hub:me/slim"
    pushed = tmp_path / "me" / "slim"
    assert sorted(path.name for path in pushed.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    timm_autoslim.check_folder(pushed)
    loaded = load(pushed)
    assert same(state(model), state(loaded))
    assert loaded.autoslim == model.autoslim
    with torch.no_grad():
        assert torch.equal(loaded(image(model)), model(image(model)))
    assert load(pushed, num_classes=3, in_chans=1)(image(model)[:, :1]).shape == (1, 3)
    text = (pushed / "README.md").read_text(encoding="utf-8")
    for line in (
        'model = timm.create_model("hf-hub:me/slim", pretrained=True)',
        "- **top-1:** 71.5",
        "- timm-autoslim",
    ):
        assert line in text.splitlines()
    params = sum(parameter.numel() for parameter in model.parameters())
    assert f"- **parameters:** {params:,}" in text


@pytest.mark.parametrize("option", ["model_args", "safe_serialization"])
def test_what_the_folder_says_is_no_option(option, exported):
    with pytest.raises(ArtifactError, match=f"push {option}=: got True; needed: no such option: the folder says it"):
        timm_autoslim.push(exported[1], "me/slim", **{option: True})


def test_a_timm_that_does_not_know_the_installed_hub_is_named(exported, monkeypatch):
    monkeypatch.setattr("timm.models._hub._has_hf_hub", False)  # as timm 1.0.16 sets it beside huggingface_hub 1
    with pytest.raises(ArtifactError, match=r"push: got timm .* cannot use huggingface_hub as it is installed"):
        timm_autoslim.push(exported[1], "me/slim")


def test_only_exported_folders_are_pushed(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json: got a file that cannot be read"):
        timm_autoslim.push(tmp_path, "me/slim")
    assert timm.is_model("autoslim")
