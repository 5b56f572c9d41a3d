"""Run functions in other processes, forked from a clean server: a process that has trained must not be forked."""

import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["timm_autoslim", "timm_autoslim.recipes.train"])


def run_apart(function, *args, cwd):
    """Call a function of a test file in another process, in the folder `cwd`.

    Returns:
        Its exit status (negative: the signal that ended it), and what it printed: stdout, stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, name) for name in ("out", "err")]
        process = _SERVER.Process(
            target=_call, args=(inspect.getfile(function), function.__name__, args, str(cwd), *map(str, logs))
        )
        process.start()
        process.join()
        out, err = (log.read_text() if log.exists() else "" for log in logs)
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def _call(file, function, args, cwd, out, err):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.chdir(cwd)
    status = 70  # of a fault that is not the function's
    with open(out, "w") as one, open(err, "w") as two, contextlib.redirect_stdout(one), contextlib.redirect_stderr(two):
        try:
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            status = getattr(module, function)(*args) or 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
    sys.exit(status)
