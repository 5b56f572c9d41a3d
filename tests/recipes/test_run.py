"""recipes/run.py: all stages with one command."""

import csv
import io
import json
from dataclasses import replace

import pytest
import timm
import yaml
from helpers.recipes import RECIPES, launch, write_config

from timm_autoslim import Accuracy
from timm_autoslim.errors import BudgetError, ConfigError, OutputExistsError
from timm_autoslim.recipes import finetune, run, search, train
from timm_autoslim.recipes.lib.networks import read_networks
from timm_autoslim.recipes.lib.ownership import FolderInUseError, own_folder


def test_flags_of_run_are_configuration_values():
    flags = ["--train-epochs", "3", "--budgets", "macs=40%", "params=1M", "--amp", "--scale", "0.5", "1", "--lr=1e-1"]
    assert run.read_flags(flags) == {
        "train_epochs": 3, "budgets": ["macs=40%", "params=1M"], "amp": True, "scale": [0.5, 1], "lr": "1e-1"
    }  # fmt: skip
    assert run.read_flags(["--experiment", "@a", "--data-dir=b: c: d"]) == {"experiment": "@a", "data_dir": "b: c: d"}
    with pytest.raises(ConfigError, match="'stray' is no flag"):
        run.read_flags(["stray"])


@pytest.mark.parametrize("name", ["1", "2024-01-02", "@a", "1e3"])
def test_any_text_is_the_name_of_a_run(tmp_path, monkeypatch, name):
    monkeypatch.setattr(run, "launch", lambda *_: None)
    with pytest.raises(ConfigError, match=rf"{name} holds no search/searched\.json"):
        run.main(["-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", name])
    with pytest.raises(ConfigError, match="experiment: True in the flags does not fit: it needs text"):
        run.main(["-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", "yes"])


@pytest.mark.slow
def test_all_stages_with_one_command(tmp_path, monkeypatch, capsys):
    command = ["-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", "all", "--finetune-lr", "0.01"]
    done = launch(str(RECIPES / "run.py"), *command)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "all"
    names = ["macs-60pct-searched", "macs-60pct-uniform"]
    assert list(read_networks(folder)) == names
    results = Accuracy.load_run(folder)
    assert list(results) == names
    assert yaml.safe_load((folder / "args.yaml").read_text())["num_classes"] == 10
    assert yaml.safe_load((folder / "finetune" / names[0] / "args.yaml").read_text())["lr"] == 0.01
    for table in ("summary.csv", "search.csv", f"finetune/{names[0]}/summary.csv"):
        assert len(list(csv.reader(io.StringIO((folder / table).read_text())))) > 1
    assert (folder / "table.md").read_text() in done.stdout
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("loaded again")] == names
    for name in names:
        model = timm.create_model(f"local-dir:{folder / 'exported' / name}", pretrained=True)
        assert sum(parameter.numel() for parameter in model.parameters()) == results[name].params
        assert model.pretrained_cfg["input_size"] == (1, 16, 16)
        assert f"loaded again: {name} {results[name].top1:.2f} %" in done.stdout
        card = (folder / "exported" / name / "README.md").read_text()
        expected = {"budget": "macs <= 60%", "method": results[name].method, "MACs": f"{results[name].macs:,}"}
        expected |= {"params": f"{results[name].params:,}", "test top-1, %": round(results[name].top1, 2)}
        assert all(f"| {label} | {value} |" in card for label, value in expected.items())

    monkeypatch.setattr(run, "launch", lambda *_: pytest.fail("a finished stage ran again"))
    run.main(command)
    assert "| macs 60% | searched |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"was begun with other settings: --seed was not given, and is 5\. To go on"):
        run.main([*command, "--seed", "5"])
    run.main(command[:-2])
    assert "Left out, and as before: --finetune-lr 0.01.\n" in capsys.readouterr().out
    with pytest.raises(OutputExistsError, match=r"exists: this network is done"):
        finetune.main([str(folder), "--network", names[0]])
    with pytest.raises(OutputExistsError, match=r"holds a training \(supernet.safetensors\): --resume it"):
        train.main(command[:-2])
    with pytest.raises(OutputExistsError, match=r"was searched with the supernet of 1 epochs: train for --epochs 2 in"):
        train.main([*command[:-2], "--resume", "--epochs", "2"])
    with pytest.raises(OutputExistsError, match=r"search holds a finished search"):
        search.main([str(folder)])
    with pytest.raises(ConfigError, match=r"Did you mean macs-60pct-uniform\?"):
        finetune.main([str(folder), "--network", "uniform"])

    # a fine-tuning that was killed between its export and its result
    exported = folder / "exported" / names[0]
    result = (exported / "result.json").read_text()
    (exported / "result.json").unlink()
    launched = []

    def launch_here(_, recipe, *arguments):
        launched.append(recipe)
        finetune.main([str(argument) for argument in arguments])

    monkeypatch.setattr(run, "launch", launch_here)
    run.main(command)
    assert launched == ["finetune.py"]
    again, before = json.loads((exported / "result.json").read_text()), json.loads(result)
    assert before.pop("epochs") == 1
    assert again.pop("loss") == pytest.approx(before.pop("loss"), rel=1e-5)
    assert again == before

    # networks of an earlier search
    (folder / "search").rename(folder / "search-1")
    with pytest.raises(BudgetError, match="out of reach"):
        search.main([str(folder), "--budgets", "macs=0.1%"])
    search.main([str(folder), "-c", str(folder / "config.yaml"), "--budgets", "macs=60%", "--steps", "3",
                 "--images", "1000"])  # of 32: all  # fmt: skip
    widths = read_networks(folder)[names[0]].widths.to_dict()
    assert widths != before["widths"]
    for text in ("a network of this name with other widths, of an earlier search", "holds a model with other widths"):
        with pytest.raises(OutputExistsError, match=text):
            finetune.main([str(folder), "--network", names[0]])
        (exported / "result.json").unlink(missing_ok=True)


def test_the_table_shows_networks_of_earlier_searches_too():
    row = Accuracy("searched", "macs<=50%", 5_000_000, 1000, 50.0, {})
    results = {"old": row, "first": replace(row, budget="macs<=9%"), "second": replace(row, method="uniform")}
    lines = run.make_table(run.sort_results(["first", "second"], results)).splitlines()[2:]
    assert [line[:22] for line in lines] == [
        "| macs 9% | searched |",
        "| macs 50% | uniform |",
        "| macs 50% | searched ",
    ]
    assert lines[2].endswith("| 5.00M | 1.0K | 50.00 |")


def test_of_two_commands_one_runs_the_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "launch", lambda *_: pytest.fail("a stage was run"))
    with own_folder(tmp_path / "all", lock=".run.lock"), pytest.raises(FolderInUseError, match="all is in use by"):
        run.main(["-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", "all"])
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("budgets", ["macs=60%", "latency_ms=60%"])
def test_every_stage_runs_in_the_processes_asked_for(tmp_path, monkeypatch, budgets):
    launched = []
    monkeypatch.setattr(run, "launch", lambda count, recipe, *_: launched.append((recipe, count)))
    with pytest.raises(ConfigError, match=r"holds no search/searched\.json"):
        run.main(
            ["-c", write_config(tmp_path), "--output", str(tmp_path), "--num-processes", "3", "--budgets", budgets]
        )
    assert launched == [("train.py", 3), ("search.py", 3)]
