"""A forward that asks about sizes takes the same path in every subnet as at the widest."""

import functools
import math
import re
import threading
from math import sqrt

import numpy as np
import pytest
import torch
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import NothingToSlimError

TABLE = {12: 1, 6: 1}
SIZES = frozenset({6, 5})


class Asking(nn.Module):
    """Two widths, 12 and 8 channels; what the forward asks about them decides what it computes."""

    def __init__(self, ask, a=12, b=8):
        super().__init__()
        self.ask, self.table, self.sizes, self.width = ask, {12: True, 4: False}, (12, 8), a
        self.a, self.b, self.head = nn.Conv2d(3, a, 1), nn.Conv2d(a, b, 1), nn.Linear(b, 5)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x).relu()
        return self.head((3 * y if self.ask(self, x.shape[1], y.shape[1]) else y).mean((2, 3)))


def ask_by_match(s, c, d):
    match c:
        case 12:
            return True
        case _:
            return False


def ask_by_value(s, c, d):
    return (False, True)[c % 4 == 0]


def ask_over_two_lines(s, c, d):
    return s.table.get(
        c,
        False,
    )


# By name: what is asked, and by group the least widths at which convert leaves it; "" for fixed channels.
QUESTIONS = {
    "a difference": (lambda s, c, d: c - d, {"a": 9, "b": 1}),
    "a difference that is compared": (lambda s, c, d: c - d == 0, {"a": 9, "b": 1}),
    "bool": (lambda s, c, d: bool(c - d), {"a": 9, "b": 1}),
    "not": (lambda s, c, d: not c - d, {"a": 9, "b": 1}),
    "a difference and a number": (lambda s, c, d: c - 8, {"a": 9, "b": 1}),
    "a remainder": (lambda s, c, d: c % 4 == 0, {"a": "", "b": 1}),
    "a remainder as such": (lambda s, c, d: not c % 4, {"a": "", "b": 1}),
    "divmod": (lambda s, c, d: divmod(c, 4)[1] == 0, {"a": "", "b": 1}),
    "a remainder of two": (lambda s, c, d: c % d == 4, {"a": "", "b": ""}),
    "a bit": (lambda s, c, d: c & 4, {"a": "", "b": 1}),
    "a shift": (lambda s, c, d: c >> 3 == 1, {"a": 8, "b": 1}),
    "a number below": (lambda s, c, d: c >= 5, {"a": 5, "b": 1}),
    "a number far below": (lambda s, c, d: c > 1, {"a": 2, "b": 1}),
    "a number close below": (lambda s, c, d: c > 9, {"a": "", "b": 1}),
    "a number above": (lambda s, c, d: c < 64, {"a": 1, "b": 1}),
    "a number on the left": (lambda s, c, d: 5 <= c, {"a": 5, "b": 1}),  # noqa: SIM300
    "between numbers": (lambda s, c, d: 4 < c < 20, {"a": 5, "b": 1}),
    "equal to a number": (lambda s, c, d: c == 12, {"a": "", "b": 1}),
    "unequal to a number": (lambda s, c, d: c != 3, {"a": 4, "b": 1}),
    "a float": (lambda s, c, d: c > 4.5, {"a": 5, "b": 1}),
    "a quotient": (lambda s, c, d: c // 4 == 3, {"a": "", "b": 1}),
    "a true quotient": (lambda s, c, d: c / 4 == 3, {"a": "", "b": 1}),
    "a quotient of two": (lambda s, c, d: c / d == 1.5, {"a": "", "b": ""}),
    "a sum": (lambda s, c, d: c + d == 20, {"a": "", "b": ""}),
    "a product": (lambda s, c, d: c * d > 80, {"a": "", "b": ""}),
    "a tuple": (lambda s, c, d: c in (8, 12), {"a": "", "b": 1}),
    "not in a list": (lambda s, c, d: c not in [3, 4], {"a": 5, "b": 1}),
    "a set": (lambda s, c, d: c in {8, 12}, {"a": "", "b": 1}),
    "a set that it is not in": (lambda s, c, d: c in SIZES, {"a": 7, "b": 1}),
    "a range": (lambda s, c, d: c in range(6, 20), {"a": "", "b": 1}),
    "sizes of the model": (lambda s, c, d: c in s.sizes, {"a": "", "b": 1}),
    "a dict": (lambda s, c, d: c in TABLE, {"a": "", "b": 1}),
    "a lookup": (lambda s, c, d: s.table[c], {"a": "", "b": 1}),
    "get": (lambda s, c, d: s.table.get(c, False), {"a": "", "b": 1}),
    "get what is not there": (lambda s, c, d: {4: True, 3: True}.get(c), {"a": 5, "b": 1}),
    "get over lines": (ask_over_two_lines, {"a": "", "b": 1}),
    "min": (lambda s, c, d: min(c, 5) == 5, {"a": 6, "b": 1}),
    "max": (lambda s, c, d: max(5, c) == c, {"a": 6, "b": 1}),
    "min of two": (lambda s, c, d: min(c, d) == d, {"a": 9, "b": 1}),
    "sorted": (lambda s, c, d: sorted((c, 5))[0] == 5, {"a": 6, "b": 1}),
    "any": (lambda s, c, d: any(c == n for n in (12, 9)), {"a": "", "b": 1}),
    "match": (ask_by_match, {"a": "", "b": 1}),
    "an index": (ask_by_value, {"a": "", "b": 1}),
    "a layer": (lambda s, c, d: s.a.out_channels % 4 == 0, {"a": "", "b": 1}),
    "an attribute": (lambda s, c, d: s.width - c, {"a": 1, "b": 1}),
    "numel": (lambda s, c, d: s.head.weight.numel() % 8 == 0, {"a": 1, "b": ""}),
    "two sizes and a number": (lambda s, c, d: c - 4 == d, {"a": "", "b": ""}),
    "a number and two sizes": (lambda s, c, d: d + 4 != c, {"a": "", "b": ""}),
    "two sizes as a tuple": (lambda s, c, d: (c - 4, 1) == (d, 1), {"a": "", "b": ""}),
    "an attribute and a size": (lambda s, c, d: s.width - 4 == d, {"a": 1, "b": ""}),
    "a product of two": (lambda s, c, d: c * d - 8 * c == 0, {"a": "", "b": ""}),
    "a set of two": (lambda s, c, d: len({c, d}) == 2, {"a": 9, "b": 1}),
    "a set of a list": (lambda s, c, d: len(set([c, d])) == 2, {"a": 9, "b": 1}),  # noqa: C405
    "keys": (lambda s, c, d: len(dict.fromkeys((c, d))) == 2, {"a": 9, "b": 1}),
    "a whole quotient": (lambda s, c, d: (c / 4).is_integer(), {"a": "", "b": 1}),
    "half": (lambda s, c, d: c * 0.5 >= 5, {"a": "", "b": 1}),
    "a root": (lambda s, c, d: c**0.5 >= 3, {"a": 9, "b": 1}),
    "an inverse": (lambda s, c, d: 1 / c < 0.1, {"a": "", "b": 1}),
    "math": (lambda s, c, d: math.log2(d).is_integer(), {"a": 1, "b": ""}),
    "math of integers": (lambda s, c, d: math.gcd(c, 4) == 4, {"a": "", "b": 1}),
    "math with an option": (lambda s, c, d: math.isclose(c, 12, rel_tol=1e-3), {"a": "", "b": 1}),
    "math of a list": (lambda s, c, d: math.fsum([c, 2]) > 6, {"a": 5, "b": 1}),
    "math by its name": (lambda s, c, d: sqrt(c) > 3, {"a": "", "b": 1}),
    "numpy": (lambda s, c, d: np.sqrt(c) > 2, {"a": 5, "b": 1}),
    "bits": (lambda s, c, d: c.bit_length() == 4, {"a": 8, "b": 1}),
    "strides": (lambda s, c, d: s.b.weight.stride()[0] > 5, {"a": 6, "b": 1}),
    "a stride": (lambda s, c, d: s.b.weight.stride(0) > 5, {"a": 6, "b": 1}),
    "bytes": (lambda s, c, d: s.a.weight.nbytes > 60, {"a": 6, "b": 1}),
    "a layer's weight": (lambda s, c, d: s.b.weight.size(0) > 3, {"a": 1, "b": 4}),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_subnets_take_the_path_of_the_widest(name):
    ask, least = QUESTIONS[name]
    model = randomise(Asking(ask)).eval()
    if set(least.values()) == {""}:
        with pytest.raises(NothingToSlimError, match=r"the code asks about their number at .*test_paths.py:\d+"):
            convert(model, torch.zeros(1, 3, 8, 8))
        return
    supernet = convert(model, torch.zeros(1, 3, 8, 8))
    space, images = supernet.space, torch.randn(2, 3, 4, 4)
    assert {n: space[n].floor if n in space.names else "" for n in ("a", "b")} == least
    reasons = space.list_floor_reasons()
    assert reasons.keys() == {n for n, width in least.items() if width not in ("", 1)}
    assert all(re.fullmatch(r"the code asks about their number at .*test_paths.py:\d+", r) for r in reasons.values())
    assert all(f"  {n}: {least[n]}, {reason}" in str(space).splitlines() for n, reason in reasons.items())
    factor = 3 if ask(model, 12, 8) else 1
    for a in range(least["a"] or 12, 13):
        for b in range(least["b"] or 8, 9):
            widths = {n: w for n, w in (("a", a), ("b", b)) if n in space.names}
            x = (torch.nn.functional.conv2d(images, model.a.weight[:a], model.a.bias[:a])).relu()
            x = torch.nn.functional.conv2d(x, model.b.weight[:b, :a], model.b.bias[:b]).relu()
            expected = (factor * x).mean((2, 3)) @ model.head.weight[:, :b].T + model.head.bias
            torch.testing.assert_close(supernet(images, space.from_dict(widths)), expected)


# Questions that no number reports: the proof sees that a subnet calls other functions of torch.
UNSEEN = {
    "int": lambda s, c, d: int(c) >= 7,
    "float": lambda s, c, d: float(c) >= 7,
    "a float on the left": lambda s, c, d: 0.5 * c > 4,
    "len": lambda s, c, d: len(s.a.weight) >= 7,
    "str": lambda s, c, d: str(c) == "12",
    "format": lambda s, c, d: f"{c}".startswith("1"),
    "range": lambda s, c, d: len(range(c)) > 6,
    "an item": lambda s, c, d: ([False] * 7 + [True] * 6)[c],
    "a repeated list": lambda s, c, d: len([0] * c) > 6,
    "numel of a shape": lambda s, c, d: s.a.weight.shape.numel() > 20,
    "numpy of a shape": lambda s, c, d: np.prod(s.a.weight.shape) > 20,
    "an array": lambda s, c, d: bool((np.array([c, 8]) > 7).all()),
    "a ratio": lambda s, c, d: (c / 8).as_integer_ratio()[1] == 2,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_subnet_that_calls_other_functions_is_found_out(name):
    supernet = convert(randomise(Asking(UNSEEN[name])), torch.zeros(1, 3, 8, 8))
    assert supernet.space.names == ("b",)
    assert re.search(r"takes another path at .*test_paths.py:\d+", supernet.graph.fixed["a.weight", 0])


def test_the_numbers_of_a_tensor_that_the_code_reads_stay():
    supernet = convert(Asking(lambda s, c, d: torch.tensor([c, 3]).min().item() == 3), torch.zeros(1, 3, 8, 8))
    assert supernet.space.names == ("b",)
    assert supernet.graph.fixed["a.weight", 0].endswith("reads numbers that are computed from their number")


def test_caches_are_no_paths():
    """What they hold decides where the code calls functions of torch, but not what a subnet computes."""

    class Scaled(Asking):
        def forward(self, x):
            x = self.a(x).relu() * make_scale(int(self.a.out_channels))
            key = int(self.b.out_channels)
            y = self.b(x).relu()
            if key not in self.memory:
                self.memory[key] = torch.full((), 1 / key)
            return self.head((y * self.memory[key]).mean((2, 3)))

    model = randomise(Scaled(None))
    model.memory = {}
    assert not (supernet := convert(model, torch.zeros(1, 3, 8, 8))).repairs
    assert supernet.space.names == ("a", "b")


@functools.lru_cache
def make_scale(channels):
    return torch.ones(()) / channels


def test_the_reason_names_the_line():
    supernet = convert(Asking(ask_by_value), torch.zeros(1, 3, 8, 8))
    line = ask_by_value.__code__.co_firstlineno + 1
    reason = supernet.graph.fixed["a.weight", 0]
    assert reason.startswith("the code asks about their number at ")
    assert reason.endswith(f"test_paths.py:{line}, and takes another path if it is smaller")


HARMLESS = {
    "groups": lambda s, c, d: s.a.groups > 1,
    "heads": lambda s, c, d: c % s.two == 2,
    "a number that is no size": lambda s, c, d: s.two > 1,
    "above zero": lambda s, c, d: c > 0 and c and d >= 1 and c != 0,
    "the same size": lambda s, c, d: c - s.width or c // s.a.out_channels > 1 or min(c, s.width) != c,
    "a cache": lambda s, c, d: s.memory.setdefault(c, d) and s.memory[c] < 0,
    "a cache that is asked": lambda s, c, d: (c not in s.memory and s.memory.update({c: 1})) or s.memory.get(c) == 2,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_questions_hold_nothing(name):
    model = Asking(HARMLESS[name])
    model.two, model.memory = 1, {}
    space = convert(model, torch.zeros(1, 3, 8, 8)).space
    assert [(group.name, group.size, group.floor) for group in space.groups] == [("a", 12, 1), ("b", 8, 1)]


class Cached(Asking):
    """It keeps a tensor from one forward to the next, which decides where torch is called."""

    def forward(self, x):
        if getattr(self, "kept", None) is None:
            self.kept = torch.linspace(0, 1, int(x.shape[2]), device=x.device) * 2
        return super().forward(x * self.kept.view(-1, 1))


def test_a_cache_hides_no_question():
    def ask(model, c, d):
        return "yes" if int(c) > 3 and torch.zeros(1) is not None else ""

    reasons = convert(Cached(ask), torch.zeros(1, 3, 8, 8)).graph.fixed
    assert "takes another path at" in reasons["a.weight", 0]


@pytest.mark.parametrize(
    "ask",
    [
        lambda s, c, d: c == np.int64(12),
        lambda s, c, d: np.int64(12) == c,
        lambda s, c, d: np.int64(9) < c,
        lambda s, c, d: c > np.float64(9),
    ],
)
def test_numbers_of_numpy_are_numbers(ask):
    supernet = convert(Asking(ask), torch.zeros(1, 3, 8, 8))
    assert ("a.weight", 0) in supernet.graph.fixed or supernet.space["a"].floor == 10


def test_sums_of_floats_are_not_regrouped():
    """At 8 and 11 channels it is `11 * 0.1 > 8 * 0.1 + 0.3`, which is false in floats."""
    supernet = convert(Asking(lambda s, c, d: c * 0.1 > d * 0.1 + 0.3), torch.zeros(1, 3, 8, 8))
    assert ("a.weight", 0) in supernet.graph.fixed


def test_two_threads_convert_one_after_the_other():
    supernets = {}

    def run(name):
        supernets[name] = convert(Asking(lambda s, c, d: math.sqrt(c) > 2), torch.zeros(1, 3, 8, 8))

    sqrt = math.sqrt
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {supernets[i].space["a"].floor for i in range(4)} == {5}
    assert math.sqrt is sqrt
