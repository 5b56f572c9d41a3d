"""One flat YAML file for all recipes, checked key by key."""

import pytest
import torch
import yaml
from helpers.marks import slow_but
from helpers.recipes import RECIPES, parse, write_config

from timm_autoslim import cost, parse_budgets, uniform_at
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.configuration import list_flags, parse_args, pick_values
from timm_autoslim.recipes.lib.flags import FLAGS
from timm_autoslim.recipes.lib.models import make_supernet

CONFIGS = RECIPES / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_one_file_serves_every_recipe(tmp_path):
    config = write_config(tmp_path, epochs=7, finetune_epochs=3, **{"clip-grad": 2, "search_batch_size": 99})
    assert parse("train", config).clip_grad == 2.0
    assert parse("train", config).epochs == 7
    assert parse("finetune", config, "somewhere").epochs == 3
    assert [parse("search", config, "r").batch_size, parse("finetune", config, "r").batch_size] == [99, 32]
    assert parse("train", config, "--epochs", "2", "--no-amp").epochs == 2
    assert parse("search", config, "r", "--budgets", "macs=10%", "params=1M").budgets == ["macs=10%", "params=1M"]


@pytest.mark.parametrize(
    ("key", "nearest"), [("epoch", "epochs"), ("finetune_budgets", "budgets"), ("batchsize", "batch_size")]
)
def test_unknown_key_is_an_error_that_names_the_nearest(tmp_path, key, nearest):
    config = write_config(tmp_path, **{key: 1})
    for recipe in FLAGS:
        with pytest.raises(ConfigError, match=f"Unknown key '{key}' in .*: no recipe has it. .* is '.*{nearest}'"):
            parse(recipe, config, *(() if recipe == "train" else ("r",)))


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("epochs", "many", "int"), ("epochs", 1.5, "int"), ("epochs", True, "int"), ("lr", [1], "float"),
        ("amp", "yes please", "true or false"), ("model_kwargs", [1], "a mapping"),
        ("scale", [1.0], "a list of 2 shares"),
        ("rank", "error", "one of 'loss', 'per_cost'"), ("model", {"a": 1}, "text"),
    ],
)  # fmt: skip
def test_value_of_the_wrong_type_is_an_error(tmp_path, key, value, needed):
    with pytest.raises(ConfigError, match=f"{key}: .* does not fit: it needs {needed}"):
        parse("train", write_config(tmp_path, **{key: value}))


def test_a_default_that_is_changed_is_the_default_of_no_later_run():
    for _ in range(2):
        values = pick_values("train", {"model_kwargs": None})
        assert values == {"model_kwargs": {}}
        values["model_kwargs"]["depth"] = 1


def test_key_values_may_be_written_as_on_a_command_line():
    for value, read in ((True, {}), ("depth=1", {"depth": 1}), (["a=1", "b=[2,3]"], {"a": 1, "b": [2, 3]})):
        assert pick_values("train", {"model_kwargs": value}) == {"model_kwargs": read}
    with pytest.raises(ConfigError, match=r"model_kwargs: 'depth' .* needs a mapping"):
        pick_values("train", {"model_kwargs": "depth"})


def test_unreadable_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read"):
        parse("train", str(tmp_path / "nowhere.yaml"))
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"must be `key: value` lines, but holds a list"):
        parse("train", str(path))


@pytest.mark.parametrize("name", slow_but(["digits"], NAMES))
def test_every_config_parses_and_its_budgets_are_in_reach(name):
    path = CONFIGS / f"{name}.yaml"
    args = parse_args("train", None, ["-c", str(path)])
    for recipe in ("search", "finetune"):
        parse_args(recipe, None, ["somewhere", "-c", str(path)])
    args.num_classes = args.num_classes or 10
    with torch.device("meta"):
        supernet = make_supernet(args)
    texts = parse_args("search", None, ["somewhere", "-c", str(path)]).budgets
    for budget in parse_budgets(supernet, texts):
        ((metric, limit),) = budget.limits
        uniform = cost(supernet, uniform_at(supernet, metric, limit))
        assert 0.8 * limit < getattr(uniform, metric) <= limit < getattr(cost(supernet), metric)
    assert "/" not in yaml.safe_load(path.read_text()).get("data_dir", "")


def test_what_is_given_is_what_the_command_line_or_the_file_says(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("slim_epochs: 3\nlr: 0.1\ntrain_sandwich: 5\n")
    words = ["DATA", "--budgets", "macs=50%", "-c", str(config), "--no-pretrained"]
    assert list_flags("slim", words) == {"data", "budgets", "config", "pretrained", "epochs", "lr"}
    assert list_flags("slim", []) == set()
