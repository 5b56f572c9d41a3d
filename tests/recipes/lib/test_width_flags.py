"""The flags that limit the widths: shares and numbers, on the command line and in a YAML file, as Python takes them."""

import pytest
import torch
from helpers.models import TwoGroups

from timm_autoslim import convert
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.run import read_flags


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (["0.25", "50%"], [0.25, "50%"]),
        (["25%", "8"], ["25%", 8]),
        (["[25%,0.5]"], ["25%", 0.5]),
        (["inner=[25%,0.5]"], {"inner": ["25%", 0.5]}),
        (["inner=[8, 50%]", "stem=16"], {"inner": [8, "50%"], "stem": [16]}),
        ([], {}),
    ],
)
def test_choices_are_numbers_and_shares_for_all_groups_or_by_glob(words, choices, tmp_path):
    assert parse_args("slim", None, ["--choices", *words]).choices == choices
    path = tmp_path / "flags.yaml"
    path.write_text(f"choices: {words}\n")
    assert parse_args("train", None, ["-c", str(path)]).choices == choices
    path.write_text(f"choices: {choices}\n")
    assert parse_args("train", None, ["-c", str(path)]).choices == choices
    if words:  # as `all` reads its flags
        path.write_text(f"choices: {read_flags(['--choices', *words])['choices']!r}\n")
        assert parse_args("train", None, ["-c", str(path)]).choices == choices
    assert convert(TwoGroups(32), torch.zeros(1, 3, 8, 8), choices=choices).space


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["0.25", "inner=[8]"], r"--choices inner=\[8\] beside 0.25: needed widths of all groups, such as 25% 50%, or"),
        (["inner=[a]"], "'a' is no width; needed"),
        (["inner=[]"], "a list of no width; needed"),
    ],
)
def test_what_is_no_width_is_told(words, text):
    with pytest.raises(ConfigError, match=text):
        parse_args("slim", None, ["--choices", *words])


def test_all_flags_of_shares_take_per_cent():
    words = ["--teach", "40%", "--crop-pct", "90%", "--scale", "70%", "1"]
    args = parse_args("slim", None, words)
    assert (args.teach, args.crop_pct, args.scale) == (0.4, 0.9, [0.7, 1.0])
    args = parse_args("train", None, ["--sandwich-delay", "10%", "--teach-widest", "50 %"])
    assert (args.sandwich_delay, args.teach_widest) == (0.1, 0.5)
