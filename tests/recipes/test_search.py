"""recipes/search.py: budgets, baselines, progress, several processes and the report, on one tiny run."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import data
import pytest
import search
import train
from accelerate import Accelerator
from helpers.recipes import RECIPES, ROOT, common, launch_two, trained, write_config
from progress import Progress

from timm_autoslim.__main__ import main as command_line
from timm_autoslim.errors import BudgetError, ConfigError, DataError, EvaluationError

JOINT = "macs<=60% and params <= 50%"
KINDS = ["uniform", "random", "importance", "evolutionary"]
PARTS = ["--batch-size", "8"]  # 32 held-out images in four parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("methods"), "run")


def found(folder, *argv):
    search.main([str(folder), "-c", write_config(folder.parent), *PARTS, *argv])
    return json.loads((folder / "search.json").read_text())


def result(folder):
    """What a search found, without how long it took."""
    content = json.loads((folder / "search.json").read_text())
    content.pop("seconds")
    return content, (folder / "search.csv").read_text()


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_search_and_baselines_meet_every_budget(folder, capsys, mode):
    argv = ["--budgets", "macs=60%", JOINT, "--baselines", *KINDS, "--candidates", "4", "--mode", mode]
    content = found(folder, *argv)
    printed = capsys.readouterr().out
    names = ["macs-60pct", "macs-60pct-params-50pct"]
    kinds = ["searched", *KINDS]
    assert [network["name"] for network in content["networks"]] == [f"{n}-{k}" for n in names for k in kinds]
    assert {(n["unit"], n["asked"]) for n in content["networks"]} == {
        ("macs", "60%"),
        ("macs and params", "60% and 50%"),
    }
    for network in content["networks"]:
        assert all(network[unit] <= limit for unit, limit in network["limits"].items())
        assert sum(network["layers"].values()) == network["macs"]
    for kind, work in content["work"].items():
        assert work["evaluations"] in {"uniform": [2], "importance": [2], "searched": range(10, 999)}.get(
            kind, range(2, 9)
        )
        line = rf"^{kind}: {work['evaluations']} subnets scored, {work['evaluated_macs'] / 1e12:.4g}T MACs of forward"
        assert re.search(line, printed, re.MULTILINE)
    assert content["work"]["searched"]["evaluated_macs"] == content["evaluated_macs"] > 0
    assert printed.index("budget macs<=60%: at most ") < printed.index("held-out images in 4 batches")
    table = list(csv.reader((folder / "search.csv").open()))
    assert len(table) == 1 + len(content["steps"]) > 1
    assert not (folder / "search-progress.json").exists()


def test_the_report_shows_the_run(folder):
    found(folder, "--budgets", "macs=60%", "macs=40%", "--baselines", "uniform", "random", "--candidates", "2")
    assert command_line(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert page.count('<tr class="random">') == 2


def test_refining_can_be_turned_off(folder):
    rough, refined = (found(folder, flag) for flag in ("--refine=none", "--refine=units"))
    space = common.load_supernet(folder, common.read_args(folder, common.parse_args("search", None, ["r"]))).space
    assert all(width in space[group].choices for group, width in rough["networks"][0]["widths"].items())
    assert refined["evaluations"] >= rough["evaluations"]
    assert refined["networks"][0]["error"] <= rough["networks"][0]["error"]
    assert refined["networks"][0]["macs"] >= rough["networks"][0]["macs"]


def test_budgets_become_texts():
    assert search.budget_texts(["macs=50%", JOINT, "params=1M", "macs<=50%"]) == [
        "macs<=50%",
        "macs<=60% and params <= 50%",
        "params<=1M",
    ]


# -- the held-out images ----------------------------------------------------------------------------------------------


def test_only_held_out_training_images_are_scored(folder, monkeypatch):
    split = json.loads((folder / "held_out.json").read_text())
    assert not set(split["training"]) & set(split["held_out"])
    loaded = []
    in_memory = data.in_memory

    def watched(args, source, indices, accelerator):
        loaded.append((source, list(indices)))
        return in_memory(args, source, indices, accelerator)

    class Untouchable:
        def __len__(self):
            raise AssertionError("the test images were touched")

        __getitem__ = __len__

    opened = data.open_images
    monkeypatch.setattr(search, "in_memory", watched)
    monkeypatch.setattr(search, "open_images", lambda args: data.Images(opened(args).train, Untouchable(), 10))
    found(folder, "--baselines", *KINDS, "--candidates", "2")
    assert [indices for _, indices in loaded] == [split["held_out"]]
    assert type(loaded[0][0]) is data.Digits
    assert json.loads((folder / "held_out.json").read_text()) == split


def test_training_never_sees_the_held_out_images(folder, tmp_path, monkeypatch):
    seen = []
    loader = data.training_loader

    def watched(args, source, indices):
        seen.append(list(indices))
        return loader(args, source, indices)

    monkeypatch.setattr(train, "training_loader", watched)
    other = trained(tmp_path, "other", "--seed", "7")
    split = json.loads((other / "held_out.json").read_text())
    assert split == json.loads((folder / "held_out.json").read_text())  # whatever the seed
    assert seen == [split["training"]]


def test_an_empty_split_is_refused(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    split = json.loads((run / "held_out.json").read_text())
    (run / "held_out.json").write_text(json.dumps(split | {"held_out": []}))
    with pytest.raises(DataError, match=r"held_out.json lists no held-out images: train a supernet with --held-out"):
        found(run)


# -- interruptions ----------------------------------------------------------------------------------------------------


def test_a_search_killed_at_any_moment_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    whole = shutil.copytree(folder, tmp_path / "whole")
    argv = ["--budgets", "macs=60%", "macs=40%", "--baselines", "uniform", "random", "--candidates", "3"]
    found(whole, *argv)
    parts = shutil.copytree(folder, tmp_path / "parts")
    (parts / "search.json").unlink(missing_ok=True)
    command = [str(RECIPES / "search.py"), str(parts), "-c", write_config(tmp_path), *PARTS, *argv]
    # every score is written at once, and the process is killed without a warning as soon as there are some
    at_once = "import sys, runpy, progress; progress.SAVED_EVERY = 0; del sys.argv[0]; "
    at_once += "runpy.run_path(sys.argv[0], run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", at_once, *command],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{RECIPES}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    path = parts / "search-progress.json"
    known = 0
    while process.poll() is None and known < 20:
        time.sleep(0.01)
        known = len(json.loads(path.read_text())["scores"]) if path.is_file() else 0
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (parts / "search.json").exists()
    known = len(json.loads(path.read_text())["scores"])
    assert known >= 20
    with pytest.raises(ConfigError, match=r"is of an interrupted search with other settings \(batch_size\): give the"):
        search.main([str(parts), "-c", write_config(tmp_path), "--batch-size", "16", *argv])
    assert len(json.loads(path.read_text())["scores"]) == known
    found(parts, *argv)
    assert result(parts) == result(whole)
    assert not path.exists()


def test_an_evaluate_that_fails_keeps_the_progress(folder, monkeypatch):
    calls = []

    def broken(outputs, targets):
        calls.append(1)
        loss = cross_entropy(outputs, targets)
        return loss * float("nan") if len(calls) == 12 else loss

    before = found(folder)
    cross_entropy = search.F.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(search.F, "cross_entropy", broken)
        with pytest.raises(EvaluationError, match=r"evaluate returned nan; .*at the widths \{'conv1"):
            found(folder)
    assert len(json.loads((folder / "search-progress.json").read_text())["scores"]) == 11
    after = found(folder)
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


def test_a_file_that_is_no_progress_is_told_and_kept(folder):
    path = folder / "search-progress.json"
    for text in ("{", "[]", '{"scores": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"is no progress of a search .*: remove it to start anew"):
            found(folder)
        assert path.read_text() == text
    path.unlink()


@pytest.mark.parametrize(
    "score",
    [None, "abc", [1.0], ["a", 64], [float("nan"), 64], [float("inf"), 64], [1.0, -1], [1.0, 8.5], [True, 8], {}],
)
def test_what_is_no_score_is_told_by_its_key_and_kept(folder, score):
    path = folder / "search-progress.json"
    text = json.dumps({"setting": {}, "scores": {"8,8:0": [1, 8], "8,8:1": score}})
    path.write_text(text)
    message = (
        rf"search-progress\.json: got {re.escape(repr(score))} as the score of '8,8:1'; .* remove the file to score"
    )
    with pytest.raises(ConfigError, match=message):
        Progress(path, {}, Accelerator())
    assert path.read_text() == text
    path.unlink()


# -- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_find_what_one_finds(folder, tmp_path):
    argv = ["--budgets", "macs=60%", "macs=40%", "--baselines", "uniform", "evolutionary", "--candidates", "6"]
    found(folder, *argv)
    two = shutil.copytree(folder, tmp_path / "two")
    (two / "search.json").unlink()
    recipe = [str(RECIPES / "search.py"), str(two), "-c", write_config(tmp_path), *PARTS, *argv]
    done = launch_two(*recipe)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert result(two) == result(folder)


# -- progress bar, bad input ------------------------------------------------------------------------------------------


def test_the_bar_tells_layer_width_error_and_distance(folder, capsys):
    content = found(folder, "--budgets", "macs=60%", "macs=40%")
    bar = capsys.readouterr().err
    for step in (content["steps"][0], content["steps"][-1]):
        assert f"{step['group']} -> {step['width']}, loss {step['error']:.4f}, " in bar
    assert re.search(r"\+\d+\.\d% macs to \d+\.\d+M", bar)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps 0: needed 1 or more"),
        (["--images", "-5"], "--images -5: needed 0 or more"),
        (["--candidates", "0"], "--candidates 0: needed 1 or more"),
        (["--cost-batch-size", "0"], "--cost-batch-size 0: needed 1 or more"),
        (["--batch-size", "0"], "--batch-size 0: needed 1 or more"),
        (["--threads", "-1"], "--threads -1: needed 0 or more"),
        (["--workers", "-1"], "--workers -1: needed 0 or more"),
        (["--seed", str(2**64)], f"--seed {2**64}: needed a number from 0 to 4294967295"),
        (["--seed", "-1"], "--seed -1: needed a number from 0 to 4294967295"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_loaded(folder, monkeypatch, flags, message):
    monkeypatch.setattr(search, "load_supernet", lambda *_: pytest.fail("the supernet was loaded"))
    with pytest.raises(ConfigError, match=message):
        found(folder, *flags)
    assert not (folder / "search-progress.json").exists()


def test_the_table_of_steps_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "search.csv"
    step = {
        "index": 0,
        "group": "a",
        "width": 8,
        "error": 0.5,
        "macs": 3,
        "params": 2,
        "evaluations": 1,
        "unit": "macs",
    }
    search.write_trace(path, [step])
    before = path.read_bytes()
    assert before == b"index,group,width,error,macs,params,evaluations\n0,a,8,0.5,3,2,1\n"
    with pytest.raises(AttributeError):
        search.write_trace(path, [step, None])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("search.csv", before)]


def test_bad_input_is_refused_before_anything_is_evaluated(folder, monkeypatch, capsys):
    monkeypatch.setattr(search, "in_memory", lambda *_: pytest.fail("images were loaded"))
    for budget, message in (
        ("macs=0.1%", r"is out of reach: the narrowest subnet"),
        ("macs<=60% and params<=1%", r"of [\d,]+ params is out of reach"),
        ("flops=3", r"got a budget in 'flops'; needed: one of"),
        ("50%", r"got the budget '50%'; needed: a text of UNIT<=AMOUNT"),
        ("macs=", r"got the budget ''; needed: a number"),
        ("watts<=3", r"got a budget in 'watts'; needed: one of"),
        ("macs=much", r"got the budget 'much'"),
    ):
        with pytest.raises(BudgetError, match=message):
            found(folder, "--budgets", budget)
    with pytest.raises(ConfigError, match=r"baselines: .* needs a list of 'uniform', 'random'"):
        common.parse_args("search", None, ["r", "-c", write_config(folder.parent, baselines=["greedy"])])
