"""The wheel: what it says of itself, and the digits road from it in an empty folder, without the repository."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import timm
import torch
import yaml

import timm_autoslim

ROOT = Path(__file__).parent.parent
SHORT = ("--train-epochs", "1", "--finetune-epochs", "1", "--search-steps", "3", "--budgets", "macs=50%")


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # of their own: a build leaves files in its folder, which a later one would take up
    for name in ("timm_autoslim", "recipes"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", sources, "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    """An environment with the wheel, not editable, and what this one has besides; and an empty folder."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])  # whose own .pth files are not read
    (folder / "empty").mkdir()
    return python, folder / "empty"


@pytest.mark.slow
def test_the_wheel_holds_the_recipes_in_the_namespace_of_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix("-0.1.0.dist-info") for name in names} == {"timm_autoslim"}
    recipes = ROOT / "recipes"
    files = [path for path in recipes.rglob("*") if path.suffix in (".py", ".yaml")]
    assert {f"timm_autoslim/recipes/{path.relative_to(recipes)}" for path in files} <= set(names)
    assert "timm_autoslim/py.typed" in names


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == timm_autoslim.__version__
    for key in ("Summary", "Author", "License-Expression", "License-File", "Keywords", "Requires-Python"):
        assert metadata[key], key
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True).decode()
    assert text.startswith("# timm-autoslim")
    assert "](docs/" not in text
    assert "](https://arxiv.org" in text


def test_links_of_readme_survive_outside_of_the_repository():
    spec = spec_from_file_location("setup_of_the_project", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "[a](docs/a.md) · [b](https://b.org) · [c](CHANGELOG.md#added)"
    assert module.make_description(text, None) == "a · [b](https://b.org) · c"
    linked = module.make_description(text, "https://host/project")
    assert "[a](https://host/project/blob/main/docs/a.md) · [b](https://b.org)" in linked
    assert linked.endswith("[c](https://host/project/blob/main/CHANGELOG.md#added)")
    assert module.read_repository('[project.urls]\nRepository = "https://host/project"\n') == "https://host/project"


@pytest.mark.slow
def test_the_digits_road_from_the_wheel_in_an_empty_folder(place):
    python, empty = place
    where = run(python, "-c", "import timm_autoslim, sys; print(timm_autoslim.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(python.parents[1])
    shown = run(python, "-m", "timm_autoslim", "all", "--output", "runs", *SHORT, cwd=empty)
    folder = empty / "runs" / "digits"
    assert (folder / "table.md").read_text() in shown
    assert str(ROOT) not in shown
    names = sorted(path.name for path in (folder / "exported").iterdir())
    assert names == ["macs-50pct-searched", "macs-50pct-uniform"]
    model = timm.create_model(f"local-dir:{folder / 'exported' / names[0]}", pretrained=True).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


@pytest.mark.slow
def test_commands_of_the_wheel(place):
    python, empty = place
    script = python.with_name("autoslim")
    assert run(script, "--version", cwd=empty).startswith(f"timm-autoslim {timm_autoslim.__version__} (torch ")
    launch = (python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "--mixed_precision", "no",
              "--num_machines", "1", "--dynamo_backend", "no", "-m", "timm_autoslim")  # fmt: skip
    train = ("train", "-c", "digits", "--epochs", "1", "--limit-train", "300", "--experiment", "launched")
    assert "Supernet: runs/launched/supernet.safetensors" in run(*launch, *train, cwd=empty)
    assert "copies/train.py" in run(script, "recipes", "copies", cwd=empty)
    changed = empty / "copies" / "lib" / "splits.py"
    changed.write_text(changed.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    run(python, "copies/train.py", *train[1:-1], "copied", cwd=empty)
    splits = [yaml.safe_load((empty / "runs" / name / "held_out.json").read_text()) for name in ("launched", "copied")]
    assert splits[0] != splits[1], "a change of the copies took no effect"
