"""Every test starts from the same seed and runs on one thread, so that equal means equal.

Nothing here imports torch before tests are collected: the process that only hands tests to others need not.
"""

import gc
import os

import pytest

gc.disable()  # until all is imported: what is imported stays, and searching it for garbage takes seconds


# These test the tracing itself; for all others the same model need not be traced a second time.
TRACING = ("tests/tracing/", "tests/supernet/test_convert", "tests/supernet/test_timm_attributes", "tests/zoo/")


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a traceback at every call


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Let standard error, which is captured, pass for a terminal: bars are shown nowhere else. Returns `capsys`."""
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda _: True, raising=False)  # of the test's own call
    return capsys


def do_once():
    """Do once what most tests do alike, to test something else."""
    import timm
    from helpers.once import count_once, create_once, draw_once

    from timm_autoslim.artifact import card, hub

    timm.create_model = create_once
    card.draw_channels = draw_once
    card.count_costs = hub.count_costs = count_once
    os.fsync = lambda handle: None  # no test cuts the power


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Trace the same model once, but for tests of the tracing; fixtures of the module do as its tests."""
    from helpers.once import trace_model, trace_once

    from timm_autoslim.supernet import convert

    convert.trace_model = trace_model if item.nodeid.startswith(TRACING) else trace_once


def pytest_collection_modifyitems(items):
    """Run tests that fork first: once autograd has threads, which some tests make it start, no process can fork it."""
    items.sort(key=lambda item: "forks" not in item.keywords)


def pytest_collection_finish():
    """Leave what is imported out of every later search for garbage, and search seldom: it took a tenth of the time."""
    import torch

    torch.set_num_threads(1)
    do_once()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
