"""Errors of the command line in one line."""

import pytest

from timm_autoslim.__main__ import main
from timm_autoslim.recipes.lib.configuration import parse_args


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--epoch", "--epochs"), ("--batchsize", "--batch-size"), ("--learning-rte=3", None), ("--labelsmoothing", None)],
)
def test_an_unknown_flag_gets_its_near_match_and_no_usage(flag, near, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args("train", None, [flag, "3"])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert f"error: unknown flag {flag.partition('=')[0]}" + (f": did you mean {near}?" if near else "") in said
    assert said.count("\n") == 2


def test_what_is_no_flag_is_told(capsys):
    with pytest.raises(SystemExit):
        parse_args("train", None, ["DATA", "--epochs", "3", "4", "5"])
    assert "error: unexpected: 4 5\n" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "near"), [(["inspect", "resnet18", "--module"], "--modules")])
def test_flags_of_commands_get_their_near_match(words, near, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert f"unknown flag {words[-1]}: did you mean {near}?" in capsys.readouterr().err


def test_an_unknown_command_is_told_with_all_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    said = capsys.readouterr().err
    assert "invalid choice: 'trian'" in said
    assert "'finetune'" in said
