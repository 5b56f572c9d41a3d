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


def test_shares_may_be_per_cent(tmp_path, capsys):
    words = ["--min-width", "10%", "--held-out", "20 %", "--limit-train", "0.5", "--val-widths", "75%", "0.25"]
    args = parse_args("train", None, words)
    assert (args.min_width, args.held_out, args.limit_train, args.val_widths) == (0.1, 0.2, 0.5, [0.75, 0.25])
    path = tmp_path / "x.yaml"
    path.write_text("min_width: 10%\nval_widths: [75%, 0.25]\n")
    assert parse_args("train", None, ["-c", str(path)]).val_widths == [0.75, 0.25]
    with pytest.raises(SystemExit):
        parse_args("train", None, ["--min-width", "ten"])
    assert "argument --min-width: invalid share value: 'ten'" in capsys.readouterr().err
