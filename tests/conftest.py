"""Every test starts from the same seed and runs on one thread, so that equal means equal.

Nothing here imports torch before tests are collected: the process that only hands tests to others need not.
"""

import gc

import pytest

gc.disable()  # until all is imported: what is imported stays, and searching it for garbage takes seconds


# These test the tracing itself; for all others the same model need not be traced a second time.
TRACING = ("tests/tracing/", "tests/supernet/test_convert", "tests/supernet/test_timm_attributes", "tests/zoo/")


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a traceback at every call


@pytest.fixture(autouse=True)
def _once(request, monkeypatch):
    """Do once what most tests do alike, to test something else."""
    import timm
    from helpers.once import create_once, draw_once, trace_once

    from timm_autoslim.artifact import card
    from timm_autoslim.supernet import convert

    monkeypatch.setattr(timm, "create_model", create_once)
    monkeypatch.setattr(card, "draw_channels", draw_once)
    if not request.node.nodeid.startswith(TRACING):
        monkeypatch.setattr(convert, "trace_model", trace_once)


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Let standard error, which is captured, pass for a terminal: bars are shown nowhere else. Returns `capsys`."""
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda _: True, raising=False)  # of the test's own call
    return capsys


def pytest_collection_modifyitems(items):
    """Run tests that fork first: once autograd has threads, which some tests make it start, no process can fork it."""
    items.sort(key=lambda item: "forks" not in item.keywords)


def pytest_collection_finish():
    """Leave what is imported out of every later search for garbage, and search seldom: it took a tenth of the time."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
