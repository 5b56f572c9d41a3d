"""What the code of a model writes to as it runs."""

import pytest
from torch import nn

from timm_autoslim.tracing.holdings import list_attributes
from timm_autoslim.tracing.writes import find_first_value, find_writes


def help_along(module):
    module.by_function = 1


class Store:
    def __init__(self):
        self.unused = 1

    def fill(self, x):
        self.filled = x


class Model(nn.Module):
    default = 4

    def __init__(self):
        super().__init__()
        self.store, self.made = Store(), {}
        self.none, self.minus = None, -1
        self.zero = 0
        self.computed = len("abc")
        self.register_buffer("buffer", None)

    def forward(self, x):
        self.step(x)
        help_along(self)
        setattr(self, "by_name", 1)  # noqa: B010
        setattr(self, f"part{x}", 1)
        self.made["x"] = x
        self.store.fill(x)

    def step(self, x):
        self.by_step = x

    def reset(self):
        self.by_reset = 1


def test_names_that_the_forward_writes_to():
    model = Model()
    writes = find_writes(model, list(list_attributes(model)))
    for name in ("by_step", "by_function", "by_name", "filled", "part0", "part12"):
        assert writes.sets(name), name
    for name in ("by_reset", "unused", "none"):
        assert not writes.sets(name), name
    assert "made" in writes.containers


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("none", (True, None)),
        ("minus", (True, -1)),
        ("zero", (True, 0)),
        ("computed", (True, None)),
        ("buffer", (True, None)),
        ("default", (False, None)),
        ("by_step", (False, None)),
    ],
)
def test_what_the_constructor_sets_first(name, first):
    assert find_first_value(Model(), name) == first
