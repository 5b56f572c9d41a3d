"""Freed memory is keeps, where malloc is glibc's and the user has not set it."""

import os
import platform
from pathlib import Path

import pytest
import torch
from helpers.recipes import parse, write_config
from helpers.subprocesses import run_apart

from timm_autoslim.recipes.lib import memory
from timm_autoslim.recipes.lib.processes import make_accelerator


def read_memory():
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_a_block(folder, variables):
    """Set a recipe up, and print how much of a freed block of 256 MiB is still resident."""
    for name in memory.MALLOC_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    make_accelerator(parse("train", write_config(folder)))
    before = read_memory()
    block = torch.ones(64 * 2**20)
    assert read_memory() - before > 250
    del block
    print(read_memory() - before)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize(
    ("variables", "keeps"),
    [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}, False)],
    ids=["by default", "malloc is set", "malloc is tuned"],
)
def test_freed_memory_is_kept_unless_the_user_has_set_malloc(tmp_path, variables, keeps):
    done = run_apart(free_a_block, tmp_path, variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 200) is keeps, done.stdout


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("no C library may be touched"))
    assert not memory.keep_memory()
