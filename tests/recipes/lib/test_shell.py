"""Errors and warnings reach the shell as messages."""

import warnings

import pytest
import torch
from helpers.recipes import parse, write_config

from timm_autoslim.__main__ import run_recipe
from timm_autoslim.errors import AutoSlimError, ConfigError, DataError
from timm_autoslim.recipes import finetune, search
from timm_autoslim.recipes.lib.image_sources import Subset
from timm_autoslim.recipes.lib.run_folder import write_args
from timm_autoslim.recipes.lib.shell import run_command


def test_errors_reach_the_shell_as_messages(tmp_path):
    with pytest.raises(SystemExit, match="ConfigError: it was so"):
        run_command(lambda: (_ for _ in ()).throw(ConfigError("it was so")))
    assert issubclass(ConfigError, AutoSlimError)
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no args.yaml. Train first"):
        search.main([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"holds no search/searched.json: search first"):
        finetune.main([str(tmp_path)])
    args = parse("train", write_config(tmp_path))
    write_args(tmp_path, args)
    with pytest.raises(ConfigError, match=r"holds no supernet.safetensors: finish its training first"):
        search.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "again"), [("slim", "the same command goes on from here"), ("train", "the same command with --resume")]
)
def test_an_interruption_is_a_line_that_says_how_to_go_on(command, again, monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"timm_autoslim.recipes.{command}.main", interrupt)
    monkeypatch.setattr("sys.argv", [command])
    with pytest.raises(SystemExit) as ended:
        run_recipe(command, [])
    assert ended.value.code == 130
    assert f"Interrupted: {again}" in capsys.readouterr().err


class Broken:
    """A source of images of which none can be read."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        raise OSError("no image")


@pytest.mark.slow
def test_an_error_in_a_worker_is_a_message_without_the_workers_traceback(capsys):
    def load():
        next(iter(torch.utils.data.DataLoader(Subset(Broken(), 2, range(20)), num_workers=1)))

    with pytest.raises(SystemExit) as raised:
        run_command(load)
    text = "DataError: 10 images in a row cannot be read. The first: image 0 cannot be read (no image). Mend the data."
    assert str(raised.value) == text
    assert issubclass(DataError, AutoSlimError)


def test_warnings_of_the_recipes_are_one_line(capsys):
    def warn():
        with warnings.catch_warnings(action="always"):
            Subset(Broken(), 2, range(20))._read(0)

    with pytest.raises(SystemExit):
        run_command(warn)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Warning: image 0 cannot be read (no image); the next image stands in for it."
    assert len(lines) == 10
