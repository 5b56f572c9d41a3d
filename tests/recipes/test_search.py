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
from dataclasses import replace

import pytest
from helpers.recipes import RECIPES, ROOT, launch_two, parse, run_train, write_config

from timm_autoslim import SearchResult, Step
from timm_autoslim.__main__ import main as run_command_line
from timm_autoslim.errors import BudgetError, ConfigError, DataError, EvaluationError, OutputExistsError
from timm_autoslim.recipes import search, train
from timm_autoslim.recipes.lib import images, loaders
from timm_autoslim.recipes.lib.models import load_supernet
from timm_autoslim.recipes.lib.networks import read_networks
from timm_autoslim.recipes.lib.ownership import FolderInUseError, own_folder
from timm_autoslim.recipes.lib.run_folder import read_args

JOINT = "macs<=60% and params <= 50%"
BASELINES = ["uniform", "random", "importance", "evolutionary"]
PARTS = ["--batch-size", "8"]  # 32 held-out images in four parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_train(tmp_path_factory.mktemp("methods"), "run")


def run_search(folder, *argv):
    """Run search.py in this process, without an earlier search; return the result of the search itself."""
    shutil.rmtree(folder / "search", ignore_errors=True)
    search.main([str(folder), "-c", write_config(folder.parent), *PARTS, *argv])
    return SearchResult.load(folder / "search" / "searched.json")


def read_files(folder):
    """Return what the files of a search hold, without how long it took."""
    results = {path.name: SearchResult.load(path) for path in (folder / "search").iterdir()}
    return (folder / "search.csv").read_text(), {n: replace(result, seconds=None) for n, result in results.items()}


@pytest.mark.parametrize("mode", ["fast", pytest.param("reference", marks=pytest.mark.slow)])
def test_search_and_baselines_meet_every_budget(folder, capsys, mode):
    argv = ["--budgets", "macs=60%", JOINT, "--baselines", *BASELINES, "--candidates", "4", "--mode", mode,
            "--criterion", "taylor"]  # fmt: skip
    searched = run_search(folder, *argv)
    printed = capsys.readouterr().out
    networks = read_networks(folder)
    names = ["macs-60pct", "macs-60pct-params-50pct"]
    assert list(networks) == [f"{name}-{method}" for name in names for method in ("searched", *BASELINES)]
    assert {network.text for network in networks.values()} == {"macs<=60%", "macs<=60% and params<=50%"}
    for network in networks.values():
        assert all(getattr(network.cost, metric) <= limit for metric, limit in network.limits.items())
    counts = {"uniform": [2], "importance": [2], "searched": range(10, 999)}
    for method in ("searched", *BASELINES):
        result = SearchResult.load(folder / "search" / f"{method}.json")
        assert result.evaluations in counts.get(method, range(2, 11))  # the widest and the narrowest among them
        assert result.evaluated_macs > 0
        line = rf"^{method}: {result.evaluations} subnets scored, {result.evaluated_macs / 1e12:.4g}T MACs of forward"
        assert re.search(line, printed, re.MULTILINE)
    assert printed.index("budget macs<=60%: at most ") < printed.index("held-out images in 4 batches")
    table = list(csv.reader((folder / "search.csv").open()))
    assert len(table) == 1 + len(searched.steps) > 1
    assert not (folder / "search-progress.json").exists()


@pytest.mark.slow
def test_a_finished_search_is_not_replaced(folder, monkeypatch):
    run_search(folder)
    before = read_files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(search, "load_supernet", lambda *_: pytest.fail("the supernet was loaded"))
        with pytest.raises(OutputExistsError, match=r"search holds a finished search: .* rename or remove it first"):
            search.main([str(folder), "-c", write_config(folder.parent), "--budgets", "macs=40%"])
    assert read_files(folder) == before
    (folder / "search" / "searched.json").unlink()  # as if it had been killed before it came to its end
    (folder / "search" / "random.json").write_text("{}")
    search.main([str(folder), "-c", write_config(folder.parent), *PARTS])
    assert read_files(folder) == before


def test_a_search_needs_the_folder_for_itself(folder, monkeypatch):
    monkeypatch.setattr(search, "load_supernet", lambda *_: pytest.fail("the supernet was loaded"))
    with own_folder(folder), pytest.raises(FolderInUseError, match=r"run is in use by"):
        run_search(folder)


@pytest.mark.slow
def test_the_report_shows_the_run(folder):
    run_search(folder, "--budgets", "macs=60%", "macs=40%", "--baselines", "uniform", "random", "--candidates", "2")
    assert run_command_line(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert page.count('<tr class="random">') == 2


@pytest.mark.slow
def test_refining_can_be_turned_off(folder):
    rough, refined = (run_search(folder, flag) for flag in ("--refine=none", "--refine=units"))
    args = read_args(folder, parse("search", write_config(folder.parent), str(folder)))
    space = load_supernet(folder, args).space
    assert all(width in space[group].choices for group, width in rough.networks[0].widths.items())
    assert refined.evaluations >= rough.evaluations
    assert refined.networks[0].loss <= rough.networks[0].loss
    assert refined.networks[0].cost.macs >= rough.networks[0].cost.macs


# -- the held-out images ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_held_out_training_images_are_scored(folder, monkeypatch):
    split = json.loads((folder / "held_out.json").read_text())
    assert not set(split["training"]) & set(split["held_out"])
    loads = []

    def load_batches(args, source, indices, accelerator):
        loads.append((source, list(indices)))
        return loaders.load_batches(args, source, indices, accelerator)

    def open_images(args):
        return images.Images(images.open_images(args).train, Untouchable(), 10)

    class Untouchable:
        def __len__(self):
            raise AssertionError("the test images were touched")

        __getitem__ = __len__

    monkeypatch.setattr(search, "load_batches", load_batches)
    monkeypatch.setattr(search, "open_images", open_images)
    run_search(folder, "--baselines", *BASELINES, "--candidates", "2")
    assert [indices for _, indices in loads] == [split["held_out"]]
    assert type(loads[0][0]) is images.Digits
    assert json.loads((folder / "held_out.json").read_text()) == split


@pytest.mark.slow
def test_no_held_out_image_is_trained_on(folder, tmp_path, monkeypatch):
    splits = []

    def make_training_loader(args, source, indices):
        splits.append(list(indices))
        return loaders.make_training_loader(args, source, indices)

    monkeypatch.setattr(train, "make_training_loader", make_training_loader)
    other = run_train(tmp_path, "other", "--seed", "7")
    split = json.loads((other / "held_out.json").read_text())
    assert split == json.loads((folder / "held_out.json").read_text())  # whatever the seed
    assert splits == [split["training"]]


def test_an_empty_split_is_refused(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    split = json.loads((run / "held_out.json").read_text())
    (run / "held_out.json").write_text(json.dumps(split | {"held_out": []}))
    with pytest.raises(DataError, match=r"held_out.json lists no held-out images: train a supernet with --held-out"):
        run_search(run)


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_killed_at_any_moment_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    uninterrupted = shutil.copytree(folder, tmp_path / "uninterrupted")
    argv = ["--budgets", "macs=60%", "macs=40%", "--baselines", "uniform", "random", "--candidates", "3"]
    run_search(uninterrupted, *argv)
    parts = shutil.copytree(folder, tmp_path / "parts")
    shutil.rmtree(parts / "search", ignore_errors=True)
    command = [str(RECIPES / "search.py"), str(parts), "-c", write_config(tmp_path), *PARTS, *argv]
    # every score is written at once, and the process is killed without a warning as soon as there are some
    at_once = (
        "import sys, runpy; from timm_autoslim.recipes.lib import scores; scores.SAVED_EVERY = 0; del sys.argv[0]; "
    )
    at_once += "runpy.run_path(sys.argv[0], run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", at_once, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    path = parts / "search-progress.json"
    count = 0
    while process.poll() is None and count < 20:
        time.sleep(0.01)
        count = len(json.loads(path.read_text())["scores"]) if path.is_file() else 0
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (parts / "search").exists()
    count = len(json.loads(path.read_text())["scores"])
    assert count >= 20
    with pytest.raises(ConfigError, match=r"is of an interrupted search with other settings \(batch_size\): give the"):
        search.main([str(parts), "-c", write_config(tmp_path), "--batch-size", "16", *argv])
    assert len(json.loads(path.read_text())["scores"]) == count
    run_search(parts, *argv)
    assert read_files(parts) == read_files(uninterrupted)
    assert not path.exists()


@pytest.mark.slow
def test_an_evaluate_that_fails_keeps_the_progress(folder, monkeypatch):
    calls, cross_entropy = [], search.F.cross_entropy

    def break_once(outputs, targets):
        calls.append(1)
        loss = cross_entropy(outputs, targets)
        return loss * float("nan") if len(calls) == 12 else loss

    before = run_search(folder)
    with monkeypatch.context() as patch:
        patch.setattr(search.F, "cross_entropy", break_once)
        with pytest.raises(EvaluationError, match=r"evaluate returned nan; .*at the widths \{'conv1"):
            run_search(folder)
    assert len(json.loads((folder / "search-progress.json").read_text())["scores"]) == 11
    assert replace(run_search(folder), seconds=before.seconds) == before


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder, tmp_path):
    argv = ["--budgets", "macs=60%", "macs=40%", "--baselines", "uniform", "evolutionary", "--candidates", "6"]
    run_search(folder, *argv)
    two = shutil.copytree(folder, tmp_path / "two")
    shutil.rmtree(two / "search")
    recipe = [str(RECIPES / "search.py"), str(two), "-c", write_config(tmp_path), *PARTS, *argv]
    done = launch_two(*recipe)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stdout
    assert read_files(two) == read_files(folder)


# -- progress bar, bad input ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bar_tells_layer_width_loss_and_distance(folder, terminal):
    steps = run_search(folder, "--budgets", "macs=60%", "macs=40%").steps
    bar = terminal.readouterr().err
    for step in (steps[0], steps[-1]):
        assert f"{step.group} -> {step.width}, loss {step.loss:.4f}, " in bar
    assert re.search(r"\+\d+\.\d% to \d+\.\d+ million MACs", bar)
    assert "the last network is refined" in bar
    assert re.search(r"; then \d+ scores", bar)  # something moves while a network is refined


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
        run_search(folder, *flags)
    assert not (folder / "search-progress.json").exists()


def test_the_table_of_steps_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "search.csv"
    step = Step(0, "a", 8, 0.5, 3, 2, "macs", 2.0, 1, {"macs": 2.0}, {"macs": 3.0})
    search.write_steps(path, [step])
    before = path.read_bytes()
    assert before == b"index,group,width,loss,macs,params,evaluations\n0,a,8,0.5,3,2,1\n"
    with pytest.raises(TypeError):
        search.write_steps(path, [step, None])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("search.csv", before)]


def test_bad_input_is_refused_before_anything_is_evaluated(folder, monkeypatch, capsys):
    monkeypatch.setattr(search, "load_batches", lambda *_: pytest.fail("images were loaded"))
    for budget, message in (
        ("macs=0.1%", r"is out of reach: the narrowest subnet"),
        ("macs<=60% and params<=1%", r"of [\d,]+ params is out of reach"),
        ("flops=3", r"metric: got 'flops'; needed: one of"),
        ("half", r"the budget: got 'half'; needed: a text of METRIC<=AMOUNT"),
        ("macs=", r"the budget: got ''; needed: a number"),
        ("watts<=3", r"metric: got 'watts'; needed: one of"),
        ("macs=much", r"the budget: got 'much'"),
    ):
        with pytest.raises(BudgetError, match=message):
            run_search(folder, "--budgets", budget)
    with pytest.raises(ConfigError, match=r"baselines: .* needs a list of 'uniform', 'random'"):
        parse("search", write_config(folder.parent, baselines=["greedy"]), "r")
