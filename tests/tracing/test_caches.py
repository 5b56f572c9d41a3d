"""Tensors and numbers that a forward computes once and keeps: subnets compute with right ones."""

import copy
import functools
import math
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from helpers.models import randomise
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert

IMAGE = torch.zeros(1, 3, 6, 6)


class Keeping(nn.Module):
    """A layer that multiplies its input by what it computed once of its weight."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 1, 1))
        self.matrix = nn.Parameter(torch.rand(channels, channels) / channels)
        self._w, self.table, self.pair, self.memory = None, None, None, {}
        self.register_buffer("buffer", None, persistent=False)

    def compute(self):
        return self.weight.softmax(0)

    def forward(self, x):
        return x * self.get(x)


class OnNone(Keeping):
    def get(self, x):
        if self._w is None:
            self._w = self.compute()
        return self._w


class OnMissing(Keeping):
    def get(self, x):
        if not hasattr(self, "cached"):
            self.cached = self.compute()
        return self.cached


class Detached(Keeping):
    def get(self, x):
        if self.table is None:
            with torch.no_grad():
                self.table = self.compute().clone()
        return self.table


class Buffer(Keeping):
    def get(self, x):
        if self.buffer is None:
            self.buffer = self.compute().detach()
        return self.buffer


class Pair(Keeping):
    def get(self, x):
        if self.pair is None:
            self.pair = (self.compute(), self.weight.mean())
        return self.pair[0] * self.pair[1]


class PrivateDict(Keeping):
    def __init__(self, channels):
        super().__init__(channels)
        self._memory = {}

    def get(self, x):
        if "w" not in self._memory:
            self._memory["w"] = self.compute()
        return self._memory["w"]


class Dict(Keeping):
    def get(self, x):
        if "w" not in self.memory:
            self.memory["w"] = self.compute()
        return self.memory["w"]


class Reduced(Keeping):
    """What it keeps has no channels of its own."""

    def get(self, x):
        if self._w is None:
            self._w = self.weight.sum()
        return self._w * self.weight


class Summed(Keeping):
    def get(self, x):
        if self._w is None:
            self._w = self.matrix.sum(1)[:, None, None]
        return self._w * self.weight


class EvalOnly(Keeping):
    def get(self, x):
        if self.training:
            return self.compute()
        if self._w is None:
            self._w = self.compute()
        return self._w


class InList(Keeping):
    def __init__(self, channels):
        super().__init__(channels)
        self.memory_list = []

    def get(self, x):
        if not self.memory_list:
            self.memory_list.append(self.compute())
        return self.memory_list[0]


class ByProperty(Keeping):
    @property
    def scale(self):
        if self._w is None:
            self._w = self.compute()
        return self._w

    def get(self, x):
        return self.scale


class Constant(Keeping):
    """What it keeps follows from its size."""

    def get(self, x):
        if self._w is None:
            self._w = torch.linspace(0, 1, x.shape[1], device=x.device)[:, None, None]
        return self._w * self.weight


class EachTime(Keeping):
    def get(self, x):
        self._w = self.compute()
        return self._w


class Activation(Keeping):
    def get(self, x):
        self.last = x.mean()
        return self.weight


class Nothing(Keeping):
    def get(self, x):
        return self.compute()


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.stem, self.layer, self.inner = nn.Conv2d(3, 8, 3), layer(8), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.inner(self.layer(self.stem(x)).relu()).relu().mean((2, 3)))


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = None


class Store:
    def __init__(self):
        self.w, self.table, self.items = None, {}, []

    def get(self, compute):
        if self.w is None:
            self.w = compute()
        return self.w

    __call__ = get


class Slots:
    __slots__ = ("w",)

    def __init__(self):
        self.w = None


def make_closure():
    w = None

    def get(compute):
        nonlocal w
        w = compute() if w is None else w
        return w

    return get


def make_closure_of_a_list():
    kept = []

    def get(compute):
        if not kept:
            kept.append(compute())
        return kept[0]

    return get


def make_function():
    def get(compute):
        if get.w is None:
            get.w = compute()
        return get.w

    get.w = None
    return get


class Elsewhere(Keeping):
    """It keeps one number of all of its channels, in one of many places."""

    def __init__(self, channels):
        super().__init__(channels)
        self.child, self.layers, self.store, self.slots = Child(), nn.Sequential(nn.Identity()), Store(), Slots()
        self.method, self.partial = Store().get, functools.partial(Store())
        self.closure, self.closure_of_a_list, self.function = make_closure(), make_closure_of_a_list(), make_function()
        self._memory, self.recent, self.lists = {}, deque(maxlen=2), defaultdict(list)
        self.number, self.sign = None, -1

    def compute(self):
        return self.weight.sum()

    def get(self, x):
        return self.keep(x) * self.weight


def keep_by_setattr(s, x):
    if not hasattr(s, "_late"):
        setattr(s, "_late", s.compute())  # noqa: B010
    return s._late


def keep_by_a_name(s, x):
    for i in range(1):
        if not hasattr(s, f"late{i}"):
            setattr(s, f"late{i}", s.compute())
    return s.late0


def keep_in_the_dict(s, x):
    if "_late" not in s.__dict__:
        s.__dict__["_late"] = s.compute()
    return s._late


def keep_as_a_buffer(s, x):
    if not hasattr(s, "late"):
        s.register_buffer("late", s.compute().detach(), persistent=False)
    return s.late


def keep_in_a_child(s, x):
    if s.child.w is None:
        s.child.w = s.compute()
    return s.child.w


def keep_in_a_layer(s, x):
    if not hasattr(s.layers[0], "late"):
        s.layers[0].register_buffer("late", s.compute().detach(), persistent=False)
    return s.layers[0].late


def keep_in_an_object(s, x):
    if s.store.w is None:
        s.store.w = s.compute()
    return s.store.w


def keep_in_a_table(s, x):
    if "w" not in s.store.table:
        s.store.table["w"] = s.compute()
    return s.store.table["w"]


def keep_in_a_list(s, x):
    if not s.store.items:
        s.store.items.append(s.compute())
    return s.store.items[0]


def keep_in_slots(s, x):
    if s.slots.w is None:
        s.slots.w = s.compute()
    return s.slots.w


def keep_in_a_deque(s, x):
    if not s.recent:
        s.recent.append(s.compute())
    return s.recent[0]


def keep_in_lists(s, x):
    if not s.lists["w"]:
        s.lists["w"].append(s.compute())
    return s.lists["w"][0]


def keep_in_a_private_dict(s, x):
    return s._memory["w"] if "w" in s._memory else s._memory.setdefault("w", s.compute())


def keep_a_number_where_a_sign_was(s, x):
    if s.sign < 0:
        s.sign = x.shape[1] ** -0.5
    return s.sign


def keep_a_number_in_an_object(s, x):
    if s.store.w is None:
        s.store.w = x.shape[1] ** -0.5
    return s.store.w


def make_keeper(compute):
    def keep(s, x):
        if s.number is None:
            s.number = compute(s, x)
        return s.number

    return keep


TENSORS = {
    "setattr": keep_by_setattr,
    "a name that is put together": keep_by_a_name,
    "the dict": keep_in_the_dict,
    "a buffer": keep_as_a_buffer,
    "a child": keep_in_a_child,
    "a layer": keep_in_a_layer,
    "an object": keep_in_an_object,
    "a table": keep_in_a_table,
    "a list": keep_in_a_list,
    "slots": keep_in_slots,
    "a deque": keep_in_a_deque,
    "lists": keep_in_lists,
    "a private dict": keep_in_a_private_dict,
    "a callable": lambda s, x: s.store(s.compute),
    "a method": lambda s, x: s.method(s.compute),
    "a partial": lambda s, x: s.partial(s.compute),
    "a closure": lambda s, x: s.closure(s.compute),
    "a list in a closure": lambda s, x: s.closure_of_a_list(s.compute),
    "a function": lambda s, x: s.function(s.compute),
}
NUMBERS = {
    "a number where a sign was": keep_a_number_where_a_sign_was,
    "a number in an object": keep_a_number_in_an_object,
    "a size": make_keeper(lambda s, x: x.shape[1]),
    "a power": make_keeper(lambda s, x: x.shape[1] ** -0.5),
    "an inverse": make_keeper(lambda s, x: 1 / x.shape[1]),
    "an integer": make_keeper(lambda s, x: int(x.shape[1])),
    "a float": make_keeper(lambda s, x: 0.5 * x.shape[1]),
    "a length": make_keeper(lambda s, x: len(s.weight)),
    "numpy": make_keeper(lambda s, x: float(np.prod(x.shape[1:2]))),
    "a tensor of a number": make_keeper(lambda s, x: torch.tensor(x.shape[1] ** -0.5)),
    "a sum": make_keeper(lambda s, x: torch.arange(x.shape[1]).sum()),
    "a sum of ones": make_keeper(lambda s, x: torch.ones_like(x[0, :, 0, 0]).sum()),
    "a product": make_keeper(lambda s, x: torch.ones(1) * math.sqrt(x.shape[1])),
    "a filled tensor": make_keeper(lambda s, x: x.new_full((1,), x.shape[1])),
}
KEEPERS = {
    name: type(name.title().replace(" ", ""), (Elsewhere,), {"keep": keep})
    for name, keep in {**TENSORS, **NUMBERS}.items()
}
QUICK = {"a buffer", "an object", "a closure", "a power", "an integer", "a sum"}  # run in the quick selection

# It keeps nothing that a width decides.
KEEPERS_OF_CONSTANTS = {
    "each time": lambda s, x: (setattr(s, "number", x.shape[1] ** -0.5), s.number)[1],
    "an integer each time": lambda s, x: (setattr(s, "number", int(x.shape[1])), s.number)[1],
    "a constant": make_keeper(lambda s, x: 2.0),
    "a tensor of a constant": make_keeper(lambda s, x: torch.full((1,), 3.0)),
    "a log": lambda s, x: (s.lists["log"].append(x.shape[1]), 2.0)[1],
}

FIXING = [OnNone, OnMissing, Detached, Buffer, Pair, PrivateDict, Reduced, Summed, EvalOnly, InList, ByProperty]
FREE = [Dict, EachTime, Activation, Nothing]


def run_by_hand(model, images, widths):
    """Compute what a network of these widths computes: the layer gets its slice, and computes afresh."""
    a, b = (dict(widths.to_dict()).get(n, size) for n, size in (("stem", 8), ("inner", 12)))
    layer = type(model.layer)(a)
    layer.load_state_dict({"weight": model.layer.weight[:a], "matrix": model.layer.matrix[:a, :a]})
    x = layer.eval()(F.conv2d(images, model.stem.weight[:a], model.stem.bias[:a])).relu()
    x = F.conv2d(x, model.inner.weight[:b, :a], model.inner.bias[:b]).relu().mean((2, 3))
    return F.linear(x, model.head.weight[:, :b], model.head.bias)


TIMES = slow_but(["fresh", "after a forward"], ["fresh", "after a forward", "after a forward in training"])


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("layer", [*FIXING, Constant, *FREE])
def test_subnets_compute_with_right_tensors(layer, when):
    model = randomise(Net(layer)).eval()
    images = torch.randn(2, 3, 6, 6)
    if when != "fresh":
        with torch.no_grad():
            model.train(when.endswith("training"))(images)
        model.eval()
    supernet = convert(model, IMAGE)
    with torch.no_grad():
        supernet(images)
        for seed in range(3):
            widths = supernet.space.sample(torch.Generator().manual_seed(seed))
            expected = run_by_hand(model, images, widths)
            torch.testing.assert_close(supernet(images, widths), expected)
            torch.testing.assert_close(supernet.extract(widths).eval()(images), expected)
    assert ("stem" in supernet.space.names) is (layer in FREE)
    assert "inner" in supernet.space.names


@pytest.mark.parametrize("when", TIMES)
@pytest.mark.parametrize("name", slow_but(QUICK, list(KEEPERS)))
def test_subnets_compute_with_right_numbers(name, when):
    test_subnets_compute_with_right_tensors(KEEPERS[name], when)


@pytest.mark.parametrize("name", KEEPERS_OF_CONSTANTS)
def test_what_no_width_decides_may_be_kept(name):
    layer = type("Layer", (Elsewhere,), {"keep": KEEPERS_OF_CONSTANTS[name]})
    for runs in (0, 1):
        model = randomise(Net(layer)).eval()
        for _ in range(runs):
            model(torch.zeros(2, 3, 6, 6))
        assert set(convert(model, IMAGE).space.names) == {"stem", "inner"}


def test_the_reason_of_a_number_names_the_attribute():
    fixed = convert(Net(KEEPERS["a power"]), IMAGE).graph.fixed
    assert fixed["stem.weight", 0] == "layer: its forward keeps number, which it computes from their number"


def test_the_reason_names_the_attribute_and_the_weight():
    supernet = convert(Net(OnNone), IMAGE)
    assert supernet.graph.fixed["stem.weight", 0] == "layer: its forward keeps _w, which it computes from layer.weight"


def test_converting_leaves_what_is_kept():
    model = Net(OnNone)
    model(IMAGE)
    before = model.layer._w
    convert(model, IMAGE)
    assert model.layer._w is before
    copy.deepcopy(model.eval().requires_grad_(False).stem)


def test_an_attribute_that_a_forward_needs_stays():
    """It is written, but not computed anew if it is missing."""

    class Average(Keeping):
        def __init__(self, channels):
            super().__init__(channels)
            self.average = torch.zeros(())

        def get(self, x):
            self.average = self.average * 0.9
            return self.weight + self.average

    assert set(convert(Net(Average), IMAGE).space.names) == {"stem", "inner"}


# -- dicts and sets that a forward writes to -------------------------------------------------------------------------


class State(Keeping):
    """Its constructor fills a dict, and its forward reads it and writes to it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.state = self.make_state()

    def make_state(self):
        return {}

    def get(self, x):
        scale = self.state["scale"]
        self.state["scale"] = torch.ones(()) * 2
        return self.weight * scale


class Literal(State):
    def __init__(self, channels):
        super().__init__(channels)
        self.state = {"scale": torch.ones(()), "name": "x"}


class Items(State):
    def __init__(self, channels):
        super().__init__(channels)
        self.state["scale"] = torch.ones(())


class Updated(State):
    def __init__(self, channels):
        super().__init__(channels)
        self.state.update(scale=torch.ones(()))


class Comprehended(State):
    def __init__(self, channels):
        super().__init__(channels)
        self.state = {name: torch.ones(()) for name in ("scale", "other")}


@pytest.mark.parametrize("runs", [0, 1])
@pytest.mark.parametrize("layer", [Literal, Items, Updated, Comprehended])
def test_a_dict_that_the_constructor_fills_is_state(layer, runs):
    model, images = randomise(Net(layer)).eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for _ in range(runs):
            model(images)
        supernet = convert(model, IMAGE)
        assert set(supernet.space.names) == {"stem", "inner"}
        half = supernet.space.uniform(0.5)
        torch.testing.assert_close(supernet(images, half), supernet.extract(half).eval()(images))
        assert model.layer.state["scale"] == 1 + runs  # a subnet leaves no trace


class Remembering(Keeping):
    def __init__(self, channels):
        super().__init__(channels)
        self.sizes = set()

    def get(self, x):
        known = x.shape[1] in self.sizes
        self.sizes.add(x.shape[1])
        return self.weight * 2 if known else self.weight


@pytest.mark.parametrize("runs", [0, 1])
def test_a_set_of_sizes_is_emptied_for_a_trace(runs):
    model = randomise(Net(Remembering)).eval()
    for _ in range(runs):
        model(torch.zeros(2, 3, 6, 6))
    supernet = convert(model, IMAGE)
    assert set(supernet.space.names) == {"stem", "inner"}
    supernet(IMAGE, supernet.space.uniform(0.5))
    assert model.layer.sizes == ({8} if runs else set())


class _Recipe:
    """What layers of one pattern share: a copy of a layer gets the same object, as in einops."""

    def __init__(self):
        self.table = {"p": 2}

    def apply(self, x):
        sizes = [1, 1, 1]
        for name in "p":
            sizes[self.table[name]] = 3
        return x * sizes[2]


@functools.lru_cache
def _make_recipe(pattern):
    return _Recipe()


class _Layer(nn.Module):
    def __init__(self, pattern="a"):
        super().__init__()
        self.pattern, self.recipe = pattern, _make_recipe(pattern)

    def __getstate__(self):
        return {"pattern": self.pattern}

    def __setstate__(self, state):
        self.__init__(**state)

    def forward(self, x):
        return self.recipe.apply(x)


def test_what_copies_share_with_the_model_is_not_emptied():
    model = nn.Sequential(_Layer(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    for _ in range(2):
        supernet = convert(model, torch.zeros(2, 6))
        assert supernet.space.max().to_dict() == {"1": 16}
        assert model[0].recipe.table == {"p": 2}
