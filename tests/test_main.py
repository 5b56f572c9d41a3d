"""`python -m timm_autoslim run SCRIPT`: scripts that know nothing of timm-autoslim load exported folders.

The scripts in tests/helpers/timm_scripts have the flags of timm's own, and make its calls.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.specs import make_spec
from helpers.subprocesses import run_apart
from torchvision.io import write_png

from timm_autoslim import inspect
from timm_autoslim.__main__ import main
from timm_autoslim.artifact.build import build_slim
from timm_autoslim.artifact.export import export

ROOT = Path(__file__).parent.parent


def python(*args, cwd):
    """Run Python in a process of its own."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def run_script(args, cwd):
    sys.excepthook = sys.__excepthook__
    sys.path.insert(0, cwd)  # as -m does
    return main(["run", *args])


def run(*args, cwd):
    """As `python -m timm_autoslim run ARGS...`, in a process that has imported everything already."""
    return run_apart(run_script, list(map(str, args)), str(cwd), cwd=cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the scripts, an exported model and images of two classes; and the model."""
    place = tmp_path_factory.mktemp("place")
    narrow = {"blocks.0.mlp.fc1": (100, None), "blocks.0.mlp.fc2": (None, 100)}
    model = build_slim(make_spec("test_vit", narrow, num_classes=2)).eval()
    export(model, place / "slim")
    for label in ("cat", "dog"):
        (place / "images" / label).mkdir(parents=True)
        for n in range(2):
            write_png(torch.randint(256, (3, 40, 40), dtype=torch.uint8), str(place / "images" / label / f"{n}.png"))
    shutil.copytree(ROOT / "tests" / "helpers" / "timm_scripts", place / "scripts")
    return place, model, sum(p.numel() for p in model.parameters())


pytestmark = pytest.mark.xdist_group("apart")  # the server that forks is started once
FLAGS = ("images", "--model", "local-dir:slim", "--pretrained")


@pytest.mark.slow
def test_a_script_like_timms_validate_loads_an_exported_folder(place):
    folder, _, params = place
    done = run("scripts/validate.py", *FLAGS, cwd=folder)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["model"], facts["params"], facts["spec"]) == ("VisionTransformer", params, None)
    assert facts["argv"] == ["scripts/validate.py", *FLAGS]
    assert torch.tensor(facts["logits"]).shape == (4, 2)


@pytest.mark.slow
def test_a_script_runs_from_the_command_line_as_it_does_here(place):
    command = ["-m", "timm_autoslim", "run", "scripts/validate.py", *FLAGS, "--workers", "1"]
    done, here = python(*command, cwd=place[0]), run("scripts/validate.py", *FLAGS, cwd=place[0])
    assert done.returncode == 0, done.stderr
    facts = {**json.loads(here.stdout), "argv": ["scripts/validate.py", *FLAGS, "--workers", "1"]}
    assert json.loads(done.stdout) == facts


@pytest.mark.slow
def test_without_run_timm_does_not_know_the_model(place):
    done = python("scripts/validate.py", *FLAGS, cwd=place[0])
    assert done.returncode == 1
    assert "RuntimeError: Unknown model (autoslim)" in done.stderr


@pytest.mark.parametrize(
    ("flags", "classes"),
    [
        (["--torchscript"], 2),
        (["--num-classes", "5", "--gp", "avg"], 5),
        pytest.param(["--num-classes", "2", "--model-kwargs", "drop_path_rate=0.1"], 2, marks=pytest.mark.slow),
    ],
)
def test_validate_takes_its_flags(flags, classes, place):
    folder, _, params = place
    done = run("scripts/validate.py", *FLAGS, *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert torch.tensor(facts["logits"]).shape == (4, classes)
    if "--torchscript" in flags:
        plain = json.loads(run("scripts/validate.py", *FLAGS, cwd=folder).stdout)
        assert facts["params"] == params
        assert torch.allclose(torch.tensor(facts["logits"]), torch.tensor(plain["logits"]), atol=1e-6)


@pytest.mark.parametrize("flags", [[], ["--torchscript", "--drop", "0.1", "--num-classes", "2"]])
def test_a_script_like_timms_benchmark(flags, place):
    folder, _, params = place
    done = run("scripts/benchmark.py", "-m", "local-dir:slim", *flags, cwd=folder)
    assert (done.returncode, done.stdout) == (0, f"{params} 160 True False\n"), done.stderr


def test_a_script_like_timms_inference(place):
    folder, _, _ = place
    done = run("scripts/inference.py", *FLAGS, "--topk", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    facts = json.loads(run("scripts/validate.py", *FLAGS, cwd=folder).stdout)
    best = torch.tensor(facts["logits"]).argmax(-1).tolist()
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert [name for name, *_ in rows] == ["0.png", "1.png"] * 2
    assert [int(first) for _, first, _ in rows] == best


def test_a_script_like_timms_onnx_export(place):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, model, _ = place
    done = run(
        "scripts/onnx_export.py", "slim.onnx", "--model", "local-dir:slim", "--num-classes", "2", "--img-size", "160",
        "--check-forward", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(folder / "slim.onnx", providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, 160, 160)
    logits = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), model(image), atol=1e-5)


@pytest.mark.slow
def test_a_script_like_timms_train_takes_the_package_as_a_device_module(place):
    folder, _, params = place
    flags = ("--drop-path", "0.1", "--grad-checkpointing", "--num-classes", "2")
    done = python("scripts/train.py", *FLAGS, *flags, "--device-modules", "timm_autoslim", cwd=folder)
    assert (done.returncode, done.stdout) == (0, f"VisionTransformer 2 {params}\n"), done.stderr
    trained = str(folder / "output" / "last.pth.tar")
    model = timm.create_model(f"local-dir:{folder / 'slim'}", checkpoint_path=trained)
    saved = timm.models.load_state_dict(trained)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    checked = run("scripts/validate.py", *FLAGS[:3], "--checkpoint", trained, cwd=folder)
    assert checked.returncode == 0, checked.stderr


def test_a_script_like_timms_train_resumes(place, tmp_path):
    folder, _, params = place
    flags = (f"{folder}/images", "--model", f"local-dir:{folder / 'slim'}", "--num-classes", "2")
    for more in (("--pretrained",), ("--resume", "output/last.pth.tar", "--epochs", "2", "--output", "more")):
        done = run("scripts/train.py", *flags, *more, cwd=folder_with_scripts(tmp_path))
        assert (done.returncode, done.stdout) == (0, f"VisionTransformer 2 {params}\n"), done.stderr
    first, second = (torch.load(tmp_path / at / "last.pth.tar", weights_only=False) for at in ("output", "more"))
    assert (first["epoch"], second["epoch"]) == (0, 1)
    steps = [checkpoint["optimizer"]["state"][0]["momentum_buffer"] for checkpoint in (first, second)]
    assert not torch.equal(*steps)
    assert first["state_dict_ema"].keys() == second["state_dict_ema"].keys()
    assert not torch.equal(first["state_dict_ema"]["head.weight"], second["state_dict_ema"]["head.weight"])


def test_a_script_like_timms_train_starts_from_other_weights(place, tmp_path):
    folder, model, _ = place
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    flags = (f"{folder}/images", "--model", f"local-dir:{folder / 'slim'}", "--pretrained", "--lr", "0")
    done = run("scripts/train.py", *flags, "--pretrained-path", "other.pth", cwd=folder_with_scripts(tmp_path))
    assert done.returncode == 0, done.stderr
    trained = timm.models.load_state_dict(str(tmp_path / "output" / "last.pth.tar"))
    # with another number of classes in the settings, timm makes a new head
    assert all(torch.equal(trained[name], t) for name, t in state.items() if not name.startswith("head."))
    assert not torch.equal(trained["head.weight"], state["head.weight"])


def folder_with_scripts(folder):
    shutil.copytree(ROOT / "tests" / "helpers" / "timm_scripts", folder / "scripts", dirs_exist_ok=True)
    return folder


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
    monkeypatch.chdir(tmp_path)
    assert main(["run", script]) == 2
    assert f"error: {script}: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "run: error: the following arguments are required: SCRIPT"),
        (["run", "-c", "digits"], "(all stages of the recipes are the command `all`)"),
        (["run", "--flag", "x.py"], "error: unknown flag --flag"),
        ([], "error: the following arguments are required: command"),
    ],
)
def test_run_needs_a_script(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: python -m timm_autoslim" in printed
    assert message in printed


def test_a_script_may_follow_two_dashes(capsys):
    assert main(["run", "--", "missing.py"]) == 2
    assert "error: missing.py: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["-3", "99999999999", "1" + "0" * 30])
def test_a_size_that_no_image_has_is_refused(size, capsys):
    assert main(["inspect", "resnet10t", "--size", size]) == 1
    assert f"error: --img-size {size}: no image has this height and width" in capsys.readouterr().err


def test_inspect_takes_the_size_as_timm_writes_it(capsys):
    shown = []
    for words in (["--input-size", "1", "32", "32"], ["--in-chans", "1", "--img-size", "32"]):
        assert main(["inspect", "resnet10t", *words, "--json"]) == 0
        shown.append({**json.loads(capsys.readouterr().out), "seconds": 0})
    assert shown[0] == shown[1]
    assert main(["inspect", "resnet10t", "--input-size", "3", "32", "64"]) == 1
    assert "--input-size 3 32 64: needed square images" in capsys.readouterr().err


def test_inspect_has_the_flags_of_widths_that_recipes_have(capsys):
    words = ["--img-size", "32", "--in-chans", "1", "--num-classes", "7", "--freeze", "conv1", "layer1"]
    assert main(["inspect", "resnet10t", *words, "--divisor", "16", "--choices", "layer4=[25%,64]", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    model = timm.create_model("resnet10t", in_chans=1, num_classes=7)
    rules = {"freeze": ["conv1", "layer1"], "divisor": 16, "choices": {"layer4": ["25%", 64]}}
    groups = inspect(model, torch.zeros(1, 1, 32, 32), **rules).groups
    assert [(g["name"], tuple(g["choices"])) for g in shown["groups"]] == [(g.name, g.choices) for g in groups]
    assert {name: shown[name] for name in rules} == rules
    assert main(["inspect", "resnet10t", "--min-width", "50%", "--freeze", "layr1"]) == 1
    assert "error: freeze: got a glob ('layr1') that matches no module" in capsys.readouterr().err
