"""The flags of the recipes that find and finish networks."""

import pytest
from helpers.flags import assert_groups, read_help

from timm_autoslim import BASELINES, METRICS, MODES, RANKINGS, REFINEMENTS, RUNTIMES
from timm_autoslim.recipes.lib.configuration import parse_args


@pytest.mark.parametrize(("recipe", "further"), [
    ("search", {"baselines": ("--baselines", "--candidates", "--criterion")}),
    ("slim", {"slim": ("--reconstruct", "--onnx"), "distillation": ("--teach", "--unlabelled", "--teacher")}),
])  # fmt: skip
def test_recipes_that_search_have_the_same_flags_for_it(recipe, further, capsys):
    search = (
        "--budgets",
        "--mode",
        "--rank",
        "--steps",
        "--refine",
        "--images",
        "--cost-batch-size",
        "--latency-table",
    )
    assert_groups(recipe, {"search": (*search, *METRICS), **further}, capsys)


@pytest.mark.parametrize(
    "table", [MODES, RANKINGS, REFINEMENTS, RUNTIMES, BASELINES], ids=lambda table: next(iter(table))
)
def test_choices_are_those_of_the_library(table, capsys):
    assert f"{{{','.join(table)}}}" in "".join(read_help("search", capsys).values())


def test_every_recipe_reconstructs_as_many_images_as_suit_it():
    assert parse_args("slim", None, []).reconstruct == 5000  # its models are trained already
    assert parse_args("finetune", None, ["run"]).reconstruct == 0


def test_several_budgets_of_several_limits_are_taken_word_by_word():
    budgets = ["macs=50%", "macs<=300M and params<=2M"]
    assert parse_args("search", None, ["run", "--budgets", *budgets]).budgets == budgets


def test_criteria_that_rank_no_channels_are_refused(capsys):
    for name in ("random", "reconstruction"):
        with pytest.raises(SystemExit):
            parse_args("search", None, ["run", "--criterion", name])
        assert f"invalid choice: '{name}'" in capsys.readouterr().err
