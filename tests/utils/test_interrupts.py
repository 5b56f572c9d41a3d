"""Ctrl-C in a command is one line from the first import on, and a traceback in any other program."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "short"),
    [
        (["-m", "timm_autoslim", "slim"], True),
        (["-c", "import timm_autoslim"], False),
        (["-m", "timm_autoslim", "run", "script.py"], False),
    ],
    ids=["command", "program", "script"],
)
@pytest.mark.slow
def test_an_interruption_of_the_imports_is_one_line_in_a_command(command, short, tmp_path):
    script = command[-1] == "script.py"
    module = tmp_path / ("script.py" if script else "safetensors.py")  # which stands for any import that takes long
    module.write_text("raise KeyboardInterrupt\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    if short:
        assert done.stderr == "\nInterrupted.\n"
    else:
        assert "Traceback" in done.stderr
