"""recipes/slim.py: from a trained model to slim ones, with one command."""

import contextlib
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from helpers.recipes import TINY, launch_two
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from timm_autoslim import Accuracy, HeldOut, SearchResult, batch_statistics
from timm_autoslim.errors import ArtifactError, BudgetError, ConfigError, DataError, WidthError
from timm_autoslim.recipes import finetune as finetune_recipe
from timm_autoslim.recipes import search, slim, train
from timm_autoslim.recipes.lib import comparison, teacher
from timm_autoslim.recipes.lib.comparison import Row, describe_turns, make_table
from timm_autoslim.recipes.lib.models import load_supernet
from timm_autoslim.recipes.lib.run_folder import read_args
from timm_autoslim.slimming.report import write_report

BASE = {"channels": [8, 8, 16, 16], "stem_width": 8}
FIRST, SECOND = "macs-60pct-searched", "macs-40pct-searched"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the weights of a small model that knows some digits."""
    folder = tmp_path_factory.mktemp("weights")
    config = folder / "config.yaml"
    config.write_text(json.dumps(TINY | {"epochs": 3, "limit_train": 600}))
    train.main(["-c", str(config), "--output", str(folder), "--experiment", "trained"])
    return folder / "trained" / "supernet.safetensors"


def make_command(folder, weights, *more):
    kwargs = [f"{key}={value}".replace(" ", "") for key, value in BASE.items()]
    return ["--dataset", "digits", "--model", "resnet10t", "--model-kwargs", *kwargs, "--in-chans", "1", "--img-size",
            "16", "--mean", "0.5", "--std", "0.5", "--initial-checkpoint", str(weights), "--limit-train", "200",
            "--held-out", "40", "--batch-size", "32", "--epochs", "1", "--budgets", "macs=60%", "macs=40%", "--steps",
            "2", "--threads", "1", "--color-jitter", "0", "--output", str(folder), "--experiment", "mine",
            *more]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, weights):
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    slim.main(make_command(folder, weights))
    return folder / "mine"


@pytest.mark.slow
def test_the_road_ends_with_one_table_whose_first_row_is_the_original(finished, weights, capsys):
    slim.main(make_command(finished.parent, weights))  # nothing is left to do but the comparison
    shown = capsys.readouterr().out
    assert re.findall(r"^\[(\d) of 6\] (.*)$", shown, re.MULTILINE) == [
        ("1", "the original: resnet10t (tested before)"),
        ("2", "search macs<=60%, from the original (done before)"),
        ("3", f"reconstruct, fine-tune, test and export {FIRST} (done before)"),
        ("4", f"search macs<=40%, from {FIRST} (done before)"),
        ("5", f"reconstruct, fine-tune, test and export {SECOND} (done before)"),
        ("6", "load the networks again, test and measure them"),
    ]
    table = (finished / "table.md").read_text()
    assert table in shown
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows == ["network", "---", "original", FIRST, SECOND]
    assert "Warning: 40 held-out images are few" in shown
    assert len(re.findall(r"\| [\d.e+-]+ ms \[[\d.e+-]+, [\d.e+-]+\]", table)) == 3  # the spread of each
    assert re.search(r"^All took \d+ s in \d+ calls: (\d+ s, ){5}\d+ s\.$", shown, re.MULTILINE)
    assert table in (finished / "README.md").read_text()
    results = Accuracy.load_run(finished)
    full = json.loads((finished / "original.json").read_text())["macs"]
    for name, share in ((FIRST, 0.6), (SECOND, 0.4)):
        model = timm.create_model(f"local-dir:{finished / 'exported' / name}", pretrained=True).eval()
        assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
        assert results[name].macs / full <= share


@pytest.mark.slow
def test_onnx_files_are_written_and_checked(finished, weights, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    slim.main(make_command(finished.parent, weights, "--onnx"))
    image = torch.randn(3, 1, 16, 16)
    for name in (FIRST, SECOND):
        session = onnxruntime.InferenceSession(finished / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        model = timm.create_model(f"local-dir:{finished / 'exported' / name}", pretrained=True).eval()
        logits = torch.from_numpy(session.run(None, {"images": image.numpy()})[0])
        assert torch.allclose(logits, model(image), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--onnx needs onnx and onnxscript and onnxruntime"):
        slim.main(make_command(finished.parent, weights, "--onnx"))


@pytest.mark.slow
def test_the_original_is_the_teacher_and_the_second_network_is_cut_from_the_first(finished):
    models = [timm.create_model(f"local-dir:{finished / 'exported' / name}") for name in (FIRST, SECOND)]
    shapes = [[parameter.shape for parameter in model.parameters()] for model in models]
    assert all(a >= b for one, two in zip(*shapes, strict=True) for a, b in zip(one, two, strict=True))
    args = (finished / "to-macs-40pct" / "finetune" / SECOND / "args.yaml").read_text()
    assert f"teacher: {finished}\n" in args
    assert f"model: local-dir:{finished / 'exported' / FIRST}\n" in args


@pytest.mark.slow
def test_candidates_are_scored_by_the_outputs_of_the_original_or_by_labels(finished, weights, tmp_path):
    slim.main(make_command(tmp_path, weights, "--epochs", "0", "--score-by", "labels", "--budgets", "macs=60%"))
    args = read_args(finished, SimpleNamespace(data_dir=None))
    vars(args).update(images=0, batch_size=32)
    batches = search.load_held_out(args, finished, Accelerator(cpu=True))
    soft = search.take_outputs(Accelerator(cpu=True), args, finished, batches)
    model = load_supernet(finished, args).model.eval()
    with torch.no_grad():
        assert all(torch.allclose(model(images).softmax(1), targets, atol=1e-6) for images, targets in soft)
    for run, pairs in ((finished, soft), (tmp_path / "mine", batches)):
        (network,) = SearchResult.load(run / "search" / "searched.json").networks
        supernet = load_supernet(run, args).eval()
        evaluate = HeldOut(pairs, lambda subnet, pair: cross_entropy(subnet(pair[0]), pair[1]).item())
        with torch.no_grad(), supernet.at(network.widths), batch_statistics(supernet.model):
            assert evaluate(supernet) == pytest.approx(network.loss, rel=1e-4)


STOPS = {
    "the original": ("evaluate", 1), "the first search": ("search_networks", 1), "the first tuning": ("finetune", 1),
    "the second search": ("search_networks", 2), "the second tuning": ("finetune", 2),
    "the end": ("compare_networks", 1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_stage_and_given_again_it_goes_on(stop, after, finished, weights, tmp_path, monkeypatch):
    name, ordinal = STOPS[stop]
    function, calls = getattr(slim, name), []

    def interrupt(*args, **kwargs):
        calls.append(name)
        if len(calls) == ordinal and not after:
            raise KeyboardInterrupt
        result = function(*args, **kwargs)
        if len(calls) == ordinal:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(slim, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        slim.main(make_command(tmp_path, weights))
    monkeypatch.undo()
    slim.main(make_command(tmp_path, weights))
    for network in (FIRST, SECOND):
        path = f"exported/{network}/model.safetensors"
        before, now = load_file(finished / path), load_file(tmp_path / "mine" / path)
        assert all(torch.equal(tensor, now[key]) for key, tensor in before.items())


@pytest.mark.slow
def test_a_far_budget_has_a_network_on_the_way_that_is_not_trained(weights, tmp_path, monkeypatch, capsys):
    command = make_command(tmp_path, weights, "--budgets", "macs=25%")

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed between the two searches
        patch.setattr(slim.Slimming, "_finetune", interrupt)
        with pytest.raises(KeyboardInterrupt):
            slim.main(command)
    slim.main(command)
    shown = capsys.readouterr().out
    (between,), (exported,) = ((tmp_path / "mine" / name).iterdir() for name in ("between", "exported"))
    full = json.loads((tmp_path / "mine" / "original.json").read_text())["macs"]
    assert 0.4 < Accuracy.load(between).macs / full <= 0.5
    assert 0.2 < Accuracy.load(exported).macs / full <= 0.25
    assert f"[5 of 6] reconstruct, fine-tune, test and export {exported.name}" in shown
    assert f"[4 of 6] search macs<=25%, from {between.name}\n" in shown
    plan = r"Plan: macs<=\d+ from the original \(on the way, not trained\); macs<=25% from macs<=\d+\."
    assert re.search(plan, shown)
    assert not list((tmp_path / "mine" / "finetune").glob("*/summary.csv"))
    table = (tmp_path / "mine" / "table.md").read_text()
    assert between.name not in table
    assert exported.name in table
    assert "between/" in (tmp_path / "mine" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_walk_the_same_road(weights, finished, tmp_path):
    done = launch_two("-m", "timm_autoslim", "slim", *make_command(tmp_path, weights, "--budgets", "macs=60%"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes on cpu" in done.stdout
    assert "layers, from 200 images" in done.stdout  # of both processes together
    assert done.stdout.count("[4 of 4] load the networks again") == 1
    alone, both = (SearchResult.load(run / "search" / "searched.json") for run in (finished, tmp_path / "mine"))
    assert both.networks[0].widths == alone.networks[0].widths
    assert list(Accuracy.load_run(tmp_path / "mine")) == [FIRST]


@pytest.mark.slow
def test_images_without_labels_are_taught_by_the_teacher_alone(finished, weights, tmp_path, capsys):
    folder = tmp_path / "more" / "deep"
    folder.mkdir(parents=True)
    for number in range(40):
        Image.new("L", (16, 16), 6 * number).save(folder / f"{number}.png")
    more = ["--budgets", "macs=60%", "--unlabelled", str(tmp_path / "more")]
    command = make_command(tmp_path, weights, *more)
    slim.main(command)
    shown = capsys.readouterr().out
    assert "240 training images, 40 of them without labels" in shown
    path = f"exported/{FIRST}/model.safetensors"
    before, now = load_file(finished / path), load_file(tmp_path / "mine" / path)
    assert any(not torch.equal(tensor, now[key]) for key, tensor in before.items())
    slim.main([*make_command(tmp_path, weights), *more])  # which goes on
    Image.new("L", (16, 16)).save(folder / "new.png")
    with pytest.raises(ConfigError, match="other settings: the images of --unlabelled are other ones"):
        slim.main(command)
    with pytest.raises(ConfigError, match="--unlabelled needs a --teacher, --teach above 0"):
        slim.main([*command, "--teacher", "none"])


def test_the_loss_of_a_batch_is_the_mean_over_its_images():
    lesson = object.__new__(finetune_recipe.Lesson)
    lesson.share, lesson.temperature = 0.25, 1.0
    lesson.loss_fn = torch.nn.functional.cross_entropy
    lesson.distill = lambda outputs, logits, temperature: (outputs - logits).square().mean()
    outputs, logits, targets = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, -1, 2, -1])
    each = [
        lesson.distill(outputs[i : i + 1], logits[i : i + 1], 1.0) * (1.0 if targets[i] < 0 else 0.25)
        + (0 if targets[i] < 0 else 0.75 * lesson.loss_fn(outputs[i : i + 1], targets[i : i + 1]))
        for i in range(4)
    ]
    assert torch.allclose(lesson._learn(outputs, targets, logits), torch.stack(each).mean())


@pytest.mark.slow
def test_only_what_is_needed_is_left(finished):
    weights = {
        str(path.relative_to(finished)) for path in finished.rglob("*") if path.suffix in (".safetensors", ".pt")
    }
    networks = {f"exported/{name}/model.safetensors" for name in (FIRST, SECOND)}
    assert weights == {*networks, "supernet.safetensors"}
    assert not list(finished.rglob("checkpoints"))


@pytest.mark.slow
def test_a_run_that_was_moved_goes_on_with_weights_that_were_moved(finished, weights, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "renamed")
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    slim.main([*make_command(tmp_path, moved), "--experiment", "renamed"])
    assert capsys.readouterr().out.count("(done before)") == 4
    other = tmp_path / "renamed" / "exported" / FIRST / "model.safetensors"
    other.write_bytes(other.read_bytes()[:-4] + bytes(4))
    with pytest.raises(ConfigError, match=f"to-macs-40pct holds the network of macs<=40%, cut from {FIRST}"):
        slim.main([*make_command(tmp_path, moved), "--experiment", "renamed"])


@pytest.mark.slow
def test_one_report_shows_the_networks_of_all_budgets(finished):
    page = write_report(finished).read_text()
    rows = [row for row in page.split("<tr") if "<td>searched</td>" in row]
    assert ["macs&lt;=60%" in rows[0], "macs&lt;=40%" in rows[1]] == [True, True]
    assert len(rows) == 2
    accuracies = Accuracy.load_run(finished)
    for row, name in zip(rows, (FIRST, SECOND), strict=True):
        assert f"{accuracies[name].top1:.2f} %" in row
    original = json.loads((finished / "original.json").read_text())
    assert f"{original['top1']:.2f} %" in next(row for row in page.split("<tr") if "<td>original</td>" in row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("macs=0.1%", "out of reach"),
        ("mac=50%", "did you mean 'macs'"),
        ("macs=900G", "macs<=900G: got a budget that the original is within"),
    ],
)
def test_wrong_budgets_are_told_before_any_work(budget, text, weights, tmp_path, monkeypatch):
    for name in ("order_by_images", "evaluate"):
        monkeypatch.setattr(slim, name, lambda *_: pytest.fail("at work"))
    with pytest.raises(BudgetError, match=text):
        slim.main(make_command(tmp_path, weights, "--budgets", "macs=60%", budget))


@pytest.mark.slow
def test_a_few_images_may_change_sides_when_a_network_is_loaded_again(finished, weights, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "mine")  # whose table changes
    result = Accuracy.load(finished / "exported" / FIRST)
    for images, refused in ((3, False), (4, True)):
        top1 = result.top1 + 100 * images / 360
        monkeypatch.setattr(comparison, "evaluate", lambda *_, top1=top1: {"top1": top1})
        with (
            pytest.raises(ArtifactError, match="4 images more or less")
            if refused
            else contextlib.suppress(ArtifactError)
        ):
            slim.main(make_command(tmp_path, weights))


@pytest.mark.slow
def test_a_failed_attempt_does_not_block_the_mended_one(weights, tmp_path, monkeypatch):
    for flags, error, text in (
        (("--budgets", "macs=0.1%"), BudgetError, "out of reach"),
        (("--budgets", "flops=50%"), BudgetError, "flops"),
        (("--freeze", "layr1"), WidthError, "layr1"),
        (("--held-out", "200"), DataError, "leaves none of 200"),
    ):
        with pytest.raises(error, match=text):
            slim.main(make_command(tmp_path, weights, *flags))
        assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="does not give weights of resnet10t"):
        slim.main(make_command(tmp_path, tmp_path / "nowhere.safetensors"))
    monkeypatch.setattr(slim, "search_networks", lambda *_: pytest.fail("searching"))
    for flags in (["--held-out", "30"], ["--held-out", "50", "--order", "l1"]):
        with pytest.raises(pytest.fail.Exception, match="searching"):
            slim.main(make_command(tmp_path, weights, *flags))
    assert len(json.loads((tmp_path / "mine" / "held_out.json").read_text())["held_out"]) == 50


@pytest.mark.slow
def test_settings_are_kept_once_training_has_begun_but_budgets_may_follow(finished, weights):
    with pytest.raises(ConfigError, match=r"was begun with other settings: --epochs was 1, and is 2\. To go on"):
        slim.main(make_command(finished.parent, weights, "--epochs", "2"))
    with pytest.raises(ConfigError, match=r"--mean was .*0\.5.*, and is .*0\.4"):
        slim.main(["--experiment", "mine", "--output", str(finished.parent), "--mean", "0.4"])
    with pytest.raises(ConfigError, match=r"holds the network of macs<=60%.*tighter ones may follow"):
        slim.main(make_command(finished.parent, weights, "--budgets", "macs=50%"))


@pytest.mark.slow
def test_flags_that_are_left_out_are_as_before(finished, capsys):
    before = (finished / "table.md").read_text().splitlines()
    slim.main(["--experiment", "mine", "--output", str(finished.parent)])
    shown = capsys.readouterr().out
    assert shown.count("(done before)") == 4
    for text in (
        "--model resnet10t",
        "--mean 0.5 --std 0.5",
        "--epochs 1",
        "--budgets macs=60% macs=40%",
        "--dataset digits",
    ):
        assert text in shown
    rows = [line.partition(" MB")[0] for line in (finished / "table.md").read_text().splitlines()]
    assert rows[:5] == [line.partition(" MB")[0] for line in before[:5]]


@pytest.mark.slow
def test_a_budget_in_another_metric_may_follow_and_is_searched_from_the_original(finished, weights, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "mine")
    budgets = ("--budgets", "macs=60%", "macs=40%", "params=70%")  # which leaves the most, and yet comes last
    slim.main(make_command(tmp_path, weights, *budgets))
    shown = capsys.readouterr().out
    assert "Plan: macs<=60% from the original; macs<=40% from macs<=60%; params<=70% from the original." in shown
    assert f"export {FIRST} (done before)" in shown
    assert f"export {SECOND} (done before)" in shown
    lines = (tmp_path / "mine" / "table.md").read_text().splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert rows[2:] == ["original", FIRST, SECOND, "params-70pct-searched"]


@pytest.mark.slow
def test_a_budget_between_two_networks_is_refused_before_any_work(finished, weights, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "mine")
    monkeypatch.setattr(slim, "search_networks", lambda *_: pytest.fail("work was done"))
    with pytest.raises(
        ConfigError, match=r"to-macs-40pct holds the network of macs<=40%, cut before .* macs<=50%: give"
    ):
        slim.main(make_command(tmp_path, weights, "--budgets", "macs=60%", "macs=50%", "macs=40%"))


@pytest.mark.slow
def test_other_weights_in_the_same_file_are_refused(finished, weights):
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + bytes(4))
        with pytest.raises(
            ConfigError, match=r"was begun with other settings: the weights \(--initial-checkpoint or --model\) are"
        ):
            slim.main(make_command(finished.parent, weights))
    finally:
        weights.write_bytes(before)


@pytest.mark.slow
def test_weights_of_other_classes_are_refused(weights, tmp_path):
    state = load_file(weights)
    save_file(
        {name: t[:5] if name.startswith("fc.") else t for name, t in state.items()}, tmp_path / "five.safetensors"
    )
    with pytest.raises(ConfigError, match="not of the 10 classes of the data"):
        slim.main(make_command(tmp_path, tmp_path / "five.safetensors"))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["photos", "--initial-checkpoint", "x"], "slim needs the model of your weights: give --model NAME"),
        (["--model", "resnet10t", "--data-dir", "x"], "slim starts from trained weights"),
        (["--model", "resnet10t", "--pretrained"], "slim needs images"),
        (["--model", "ressnet18", "--pretrained"], "did you mean resnet18"),
        (["--model", "resnet10t", "--pretrained", "--initial-checkpoint", "x", "y"], "two starting points"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(flags, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=text):
        slim.main(flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loads"), [(None, "original"), ("none", None), ("original", "original"), ("run", "run"), ("file", "file")]
)
def test_a_fine_tuning_has_its_teacher(name, loads, weights, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(TINY | {"initial_checkpoint": str(weights), "epochs": 0, "search_baselines": []}))
    train.main(["-c", str(config), "--output", str(tmp_path), "--experiment", "run"])
    run = tmp_path / "run"
    search.main([str(run), "-c", str(config)])
    named = {"run": str(run), "file": str(weights)}.get(name, name)
    capsys.readouterr()
    flags = ["--teacher", named] if named else []
    finetune_recipe.main([str(run), "-c", str(config), "--network", FIRST, "--epochs", "1", *flags])
    shown = capsys.readouterr().out
    assert ("teacher: " in shown) is bool(loads)
    if loads:
        assert f"teacher: {named or 'original'}, with 0.5 of the loss" in shown


def test_the_table_says_what_was_lost():
    rows = [Row("original", 80.0, 2_000_000, 1_000_000, 4_000_000, 2.0), Row("half", 79.0, 10**6, 250_000, 10**6, 1.5)]
    assert make_table(rows[0], rows[1:]).splitlines()[2:] == [
        "| original | 80.00 | | 2.00M | 1.000M | 4.00 MB | 2 ms |",
        "| half | 79.00 | 1.00 | 1.00M (50%) | 0.250M (25%) | 1.00 MB (25%) | 1.5 ms (75%) |",
    ]


def test_the_spread_of_a_latency_is_that_of_the_half_in_the_middle():
    times = [9.0, 1.0, 2.0, 3.0, 2.5]
    row = Row("original", 80.0, 1, 1, 1, **describe_turns(times, times))
    assert make_table(row, []).splitlines()[2].endswith("| 2.5 ms [1.5, 6] |")


@pytest.mark.parametrize(
    ("seconds", "device", "warns"),
    [(0.95, "cpu", False), (0.4, "cpu", True), (4.0, "cpu", False), (0.4, "cuda:0", False)],
)
def test_a_busy_machine_is_told_where_latencies_are_measured(seconds, device, warns, monkeypatch):
    clocks = SimpleNamespace(perf_counter=iter([5.0, 6.0]).__next__, process_time=iter([1.0, 1.0 + seconds]).__next__)
    monkeypatch.setattr(comparison, "time", clocks)
    with comparison._watch_processor(device) as notes:
        pass
    assert len(notes) == warns
    assert all("other work had the processor for 60% of the time" in note for note in notes)


def test_the_original_teaches_where_it_knows_the_classes():
    args = slim.argparse.Namespace(teacher=None, initial_checkpoint=None, pretrained=False)
    assert teacher.choose_teacher(args) is None
    args = slim.argparse.Namespace(
        teacher=None, initial_checkpoint=None, pretrained=True, model="resnet18", model_kwargs={}, num_classes=1000
    )
    assert teacher.choose_teacher(args) == "original"
    args.num_classes = 10
    assert teacher.choose_teacher(args) is None
    args.teacher = "none"
    assert teacher.choose_teacher(args) is None
