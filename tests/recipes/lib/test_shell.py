"""Errors reach the shell as messages."""

import pytest
from helpers.recipes import parse, write_config

from timm_autoslim.errors import AutoSlimError, ConfigError
from timm_autoslim.recipes import finetune, search
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
