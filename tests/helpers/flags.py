"""What the --help of a recipe says, by group of flags."""

import pytest

from timm_autoslim.recipes.lib.configuration import parse_args


def read_help(recipe, capsys):
    """Return the text of every group of flags in the --help of a recipe, by the group's title."""
    with pytest.raises(SystemExit):
        parse_args(recipe, None, ["--help"])
    groups, title = {}, None
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line.removesuffix(":")
        if title:
            groups[title] = f"{groups.get(title, '')}{line}\n"
    return groups


def assert_groups(recipe, expected, capsys):
    """Each of these flags stands in its group."""
    groups = read_help(recipe, capsys)
    missing = [(title, flag) for title, flags in expected.items() for flag in flags if flag not in groups[title]]
    assert not missing
