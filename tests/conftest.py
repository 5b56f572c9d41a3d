"""Every test starts from the same seed and runs on one thread, so that equal means equal."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Run tests that fork first: once autograd has threads, which some tests make it start, no process can fork it."""
    items.sort(key=lambda item: "forks" not in item.keywords)
