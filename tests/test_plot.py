"""The public module of figures."""

import subprocess
import sys

import pytest

import timm_autoslim
from timm_autoslim import plot


@pytest.mark.slow
def test_the_module_is_there_when_it_is_asked_for():
    code = (
        "import sys, timm_autoslim; assert 'matplotlib' not in sys.modules; print(timm_autoslim.plot.widths.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "widths", done.stderr
    assert timm_autoslim.plot is plot
