"""The flags of the recipes: of the model, the data and the supernet, and the recipes that have them."""

import pytest
from helpers.flags import assert_groups

from timm_autoslim import CRITERIA, SAMPLERS
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.flags import DEFAULTS, FLAGS


def test_help_groups_the_options(capsys):
    assert_groups(
        "train",
        {
            "supernet": ("--sandwich", "--sampler", "--sandwich-delay", "--regularize-widest-only"),
            "distillation": (
                "--distill-loss", "--distill-temperature", "--distill-teacher", "--teacher", "--teach-widest",
            ),
            "model and data": ("--model", "--dataset", "--num-classes", "--img-size", "--choices", "--held-out"),
            "starting point": ("--initial-checkpoint", "--zero-init-last", "--order"),
        },
        capsys,
    )  # fmt: skip


@pytest.mark.parametrize(("flag", "table"), [("--sampler", SAMPLERS), ("--order", CRITERIA)])
def test_choices_are_those_of_the_library(flag, table):
    name = flag.strip("-")
    assert [getattr(parse_args("train", None, [flag, key]), name) for key in table] == list(table)


def test_a_recipe_has_the_defaults_that_are_its_own():
    for recipe, defaults in DEFAULTS.items():
        args = vars(parse_args(recipe, None, []))
        assert {name: args[name] for name in defaults if name in args} == {
            name: value for name, value in defaults.items() if name in args
        }
    assert set(DEFAULTS) <= set(FLAGS)
    assert parse_args("train", None, []).model == "resnet18"
