"""Every test starts from the same seed and runs on one thread, so that equal means equal."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
