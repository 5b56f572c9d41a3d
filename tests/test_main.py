"""`python -m timm_autoslim run SCRIPT`: scripts that know nothing of timm-autoslim load exported folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_registry import make_recipe
from torchvision.io import write_png

from timm_autoslim.artifact import export
from timm_autoslim.registry import build_slimmed

ROOT = Path(__file__).parent.parent

# What timm's validate.py does, by the same calls.
VALIDATE = """
import argparse
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--workers", type=int, default=0)


def main():
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=None, in_chans=3).eval()
    config = resolve_data_config(vars(args), model=model, use_test_size=True)
    dataset = create_dataset("", root=args.data, split="validation")
    loader = create_loader(
        dataset, batch_size=2, use_prefetcher=False, num_workers=args.workers, device=torch.device("cpu"),
        input_size=config["input_size"], interpolation=config["interpolation"], mean=config["mean"],
        std=config["std"], crop_pct=config["crop_pct"],
    )
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in loader])
    print(type(model).__name__, sum(p.numel() for p in model.parameters()), tuple(logits.shape))


if __name__ == "__main__":
    main()
"""


def python(*args, cwd):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def run(script, *args, cwd):
    return python("-m", "timm_autoslim", "run", script, *args, cwd=cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the script, an exported model and images of two classes."""
    place = tmp_path_factory.mktemp("place")
    narrow = {"blocks.0.mlp.fc1": (100, None), "blocks.0.mlp.fc2": (None, 100)}
    model = build_slimmed(make_recipe("test_vit", narrow, num_classes=2))
    export(model, place / "slim")
    for label in ("cat", "dog"):
        (place / "images" / label).mkdir(parents=True)
        for n in range(2):
            write_png(torch.randint(256, (3, 40, 40), dtype=torch.uint8), str(place / "images" / label / f"{n}.png"))
    (place / "scripts").mkdir()
    (place / "scripts" / "validate.py").write_text(VALIDATE)
    expected = f"VisionTransformer {sum(p.numel() for p in model.parameters())} (4, 2)\n"
    return place, expected


FLAGS = ("images", "--model", "local-dir:slim", "--pretrained")


def test_a_script_like_timms_validate_loads_an_exported_folder(place):
    folder, expected = place
    done = run("scripts/validate.py", *FLAGS, "--workers", "1", cwd=folder)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_without_run_timm_does_not_know_the_model(place):
    done = python("scripts/validate.py", *FLAGS, cwd=place[0])
    assert done.returncode == 1
    assert "RuntimeError: Unknown model (autoslim)" in done.stderr


# Everything that a script can see of how it was started, its own annotations included.
STATE = """
import sys, json, helper
def f(x: int): ...
print(json.dumps([
    __name__, __file__, __package__, __spec__, __doc__, sys.argv, sys.path[0], f.__annotations__["x"] is int,
    sys.modules["__main__"].f is f, helper.VALUE,
]))
"""


def test_a_script_sees_what_python_shows_it(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "helper.py").write_text("VALUE = 7")
    (tmp_path / "inner" / "state.py").write_text(STATE)
    args = ("inner/state.py", "--flag", "--", "-h", "run")
    mine, pythons = run(*args, cwd=tmp_path), python(*args, cwd=tmp_path)
    assert pythons.returncode == 0
    assert (mine.returncode, mine.stdout, mine.stderr) == (0, pythons.stdout, "")


ENDS = {
    "raise": "def f():\n    raise KeyError('lost')\n\nf()\n",
    "syntax": "x = (\n",
    "exit with a number": "import sys\nsys.exit(7)\n",
}


@pytest.mark.parametrize("case", ENDS)
def test_a_script_ends_as_under_python(case, tmp_path):
    (tmp_path / "script.py").write_text(ENDS[case])
    mine, pythons = run("script.py", cwd=tmp_path), python("script.py", cwd=tmp_path)
    assert mine.returncode == pythons.returncode != 0
    assert (mine.stdout, mine.stderr) == (pythons.stdout, pythons.stderr)


@pytest.mark.parametrize("script", ["missing.py", ".", ""])
def test_what_is_no_script_is_refused(script, tmp_path, monkeypatch, capsys):
    from timm_autoslim.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(["run", script]) == 2
    assert f"error: {script}: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["run"], ["run", "--flag", "x.py"], []])
def test_run_needs_a_script(words, capsys):
    from timm_autoslim.__main__ import main

    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert "usage: python -m timm_autoslim" in capsys.readouterr().err
