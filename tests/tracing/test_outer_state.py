"""What a model's code keeps outside of the model: a trace leaves nothing there, and what is there changes nothing."""

import functools
import random
import types
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from torch import nn

from timm_autoslim import convert, cost, zero_last_norms
from timm_autoslim.errors import AutoSlimError
from timm_autoslim.tracing.outer_state import OuterState
from timm_autoslim.tracing.sizes import Size

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TABLES = {}
LAST = None
MEAN = torch.tensor([0.1, 0.2, 0.3])
ROWS = {"half": torch.full((8,), 0.5), "one": torch.ones(8)}


def make_table(length, channels):
    return torch.linspace(0, 1, length)[:, None].expand(length, channels)


class Tokens(nn.Module):
    """Tokens of an image, with a table of positions that a subclass keeps somewhere."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)  # (N, L, C)
        x = x + self.get_table(x).to(x.device)
        return self.head((x + self.narrow(self.wide(x).relu())).mean(1))


class OnClass(Tokens):
    TABLES: ClassVar = {}

    def get_table(self, x):
        key = tuple(x.shape[1:])
        if key not in self.TABLES:
            self.TABLES[key] = make_table(*key)
        return self.TABLES[key]


class OnDevice(OnClass):
    TABLES: ClassVar = {}

    def get_table(self, x):  # as the class above, but a table of the device of x
        key = tuple(x.shape[1:])
        if key not in self.TABLES:
            self.TABLES[key] = torch.linspace(0, 1, key[0], device=x.device)[:, None].expand(key)
        return self.TABLES[key]


class LastOnClass(Tokens):
    last = None

    def get_table(self, x):
        if LastOnClass.last is None or LastOnClass.last.shape != x.shape[1:]:
            LastOnClass.last = torch.linspace(0, 1, x.shape[1], device=x.device)[:, None].expand(x.shape[1:])
        return LastOnClass.last


class NewOnClass(Tokens):
    def get_table(self, x):
        cls = type(self)
        if getattr(cls, "table", None) is None or cls.table.shape != x.shape[1:]:
            cls.table = torch.linspace(0, 1, x.shape[1], device=x.device)[:, None].expand(x.shape[1:])
        return cls.table


class InModule(Tokens):
    def get_table(self, x):
        return TABLES.setdefault((*x.shape[1:],), make_table(*x.shape[1:]))


class LastInModule(Tokens):
    def get_table(self, x):
        global LAST
        if LAST is None or LAST.shape != x.shape[1:]:
            LAST = torch.linspace(0, 1, x.shape[1], device=x.device)[:, None].expand(x.shape[1:])
        return LAST


@functools.lru_cache(64)
def compute_shape(shape, heads):
    """As einops does: the sizes that a tensor is reshaped to, by the sizes that it has."""
    n, length, channels = shape
    return n, length, heads, channels // heads


class Shapes(Tokens):
    def get_table(self, x):
        table = make_table(*x.shape[1:]).to(x.device)
        return table + x.reshape(compute_shape(tuple(x.shape), 2)).flatten(2)


class ShapesInDict(Tokens):
    SHAPES: ClassVar = {}

    def get_table(self, x):
        shape = tuple(x.shape)
        if shape not in self.SHAPES:
            self.SHAPES[shape] = (shape[0], shape[1], 2, shape[2] // 2)
        return x.reshape(self.SHAPES[shape]).flatten(2)


class CachedMethod(Tokens):
    @functools.cache  # noqa: B019
    def compute(self, length, channels, device):
        return torch.linspace(0, 1, length, device=device)[:, None].expand(length, channels)

    @staticmethod
    @functools.cache
    def double(size):
        return size * 2 // 2

    def get_table(self, x):
        return self.compute(x.shape[1], self.double(x.shape[2]), x.device)


def remember(function):
    tables = {}

    @functools.wraps(function)
    def call(*key):
        if key not in tables:
            tables[key] = function(*key)
        return tables[key]

    return call


@remember
def remembered_table(length, channels, device):
    return torch.linspace(0, 1, length, device=device)[:, None].expand(length, channels)


class InClosure(Tokens):
    def get_table(self, x):
        return remembered_table(*x.shape[1:], x.device)


class InDefault(Tokens):
    def get_table(self, x, tables={}):  # noqa: B006
        key = tuple(x.shape[1:])
        if key not in tables:
            tables[key] = torch.linspace(0, 1, key[0], device=x.device)[:, None].expand(key)
        return tables[key]


class Keeper:
    """An object that keeps tables."""

    def __init__(self):
        self.tables, self.by_owner = {}, weakref.WeakKeyDictionary()

    def look_up(self, key, device):
        if key not in self.tables:
            self.tables[key] = torch.linspace(0, 1, key[0], device=device)[:, None].expand(key)
        self.by_owner.setdefault(self, []).append(key)
        return self.tables[key]


KEEPER = Keeper()
TOOLS = types.ModuleType("tools_of_a_model")
exec("TABLES = {}\ndef keep(key, table):\n    TABLES[key] = table()\n    return TABLES[key]", vars(TOOLS))


class InObject(Tokens):
    def get_table(self, x):
        return KEEPER.look_up(tuple(x.shape[1:]), x.device)


class InOtherModule(Tokens):
    def get_table(self, x):
        key = tuple(x.shape[1:])
        if key in TOOLS.TABLES:
            return TOOLS.TABLES[key]
        return TOOLS.keep(key, lambda: torch.linspace(0, 1, key[0], device=x.device)[:, None].expand(key))


class InInstance(Tokens):
    def __init__(self):
        super().__init__()
        self.tables = {}

    def get_table(self, x):
        key = tuple(x.shape[1:])
        if key not in self.tables:
            self.tables[key] = (torch.linspace(0, 1, key[0], device=x.device)[:, None].expand(key), key)
        return self.tables[key][0]


class ShapesInInstance(Tokens):
    def __init__(self):
        super().__init__()
        self.shapes, self.rates = {}, {}
        self.rates[2] = 1

    def get_table(self, x):
        shape = tuple(x.shape)
        if shape not in self.shapes:
            self.shapes[shape] = (shape[0], shape[1], 2, shape[2] // 2)
        self.rates[2] = self.rates[2]
        return x.reshape(self.shapes[shape]).flatten(2)


KEEPERS = [
    OnClass, OnDevice, LastOnClass, NewOnClass, InModule, LastInModule, Shapes, ShapesInDict, CachedMethod, InClosure,
    InDefault, InObject, InOtherModule, InInstance, ShapesInInstance,
]  # fmt: skip
QUICK = [LastOnClass, InModule, Shapes, ShapesInDict, CachedMethod, InClosure, InObject, ShapesInInstance]


def read_state():
    """Return all that the models above keep, as text that names the device of every tensor."""
    kept = [
        *(vars(kind) for kind in KEEPERS), TABLES, LAST, vars(TOOLS)["TABLES"], vars(KEEPER),
        remembered_table.__closure__[1].cell_contents, InDefault.get_table.__defaults__,
    ]  # fmt: skip
    return "\n".join(map(describe, kept))


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{value.device} {tuple(value.shape)} {id(value)}"
    if isinstance(value, (dict, types.MappingProxyType)):
        return str({describe(k): describe(v) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return str([describe(member) for member in value])
    return f"{type(value).__name__} {value if isinstance(value, (int, str)) else id(value)}"


def empty_all():
    global LAST
    LAST, LastOnClass.last, NewOnClass.table = None, None, None
    KEEPER.tables.clear()
    KEEPER.by_owner.clear()
    for tables in (*(vars(kind).get(n) for kind in KEEPERS for n in ("TABLES", "SHAPES")), TABLES, TOOLS.TABLES,
                   remembered_table.__closure__[1].cell_contents, *InDefault.get_table.__defaults__):  # fmt: skip
        if tables is not None:
            tables.clear()
    for cached in (compute_shape, CachedMethod.compute, CachedMethod.double):
        cached.cache_clear()


@pytest.mark.parametrize("runs", slow_but(["a run before"], ["no run before", "a run before"]))
@pytest.mark.parametrize("kind", slow_but(QUICK, KEEPERS))
def test_a_trace_leaves_nothing_behind_and_finds_the_same_after_a_run(kind, runs):
    empty_all()
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        expected = model(IMAGES)
        if runs == "no run before":
            empty_all()
            model = kind().eval() if kind in (InInstance, ShapesInInstance) else model
    before = read_state()
    supernet = convert(model, IMAGES)
    again = convert(model, IMAGES)
    assert supernet.space.max().to_dict() == {"stem": 4 if "Shapes" in kind.__name__ else 8, "wide": 12}
    assert again.graph == supernet.graph
    assert not supernet.repairs
    cost(supernet, batch_size=2)
    zero_last_norms(model, IMAGES)
    assert read_state() == before
    with torch.no_grad():
        assert kind in (InInstance, ShapesInInstance) or torch.equal(model(IMAGES), expected)
        for widths in (supernet.space.min(), supernet.space.uniform(0.5)):
            assert torch.equal(supernet(IMAGES, widths), supernet.extract(widths).eval()(IMAGES))
    if kind is Shapes:
        assert not any(isinstance(size, Size) for size in compute_shape((2, 4, 8), 2))


def test_a_failing_trace_leaves_nothing_behind():
    class Failing(OnDevice):
        def forward(self, x):
            super().forward(x)
            raise ValueError("on purpose")

    empty_all()
    before = read_state()
    with pytest.raises(AutoSlimError, match="on purpose"):
        convert(Failing(), IMAGES)
    assert read_state() == before


def test_a_table_without_its_size_as_key_holds_the_channels():
    """The supernet and its subnets share it, so no other width could use it."""

    class Unkeyed(Tokens):
        table = None

        def get_table(self, x):
            if Unkeyed.table is None:
                Unkeyed.table = make_table(*x.shape[1:])
            return Unkeyed.table

    for _ in range(2):
        supernet = convert(Unkeyed(), IMAGES)
        assert supernet.space.max().to_dict() == {"wide": 12}
        Unkeyed()(IMAGES)


def test_tensors_that_are_no_cache_stay_where_they_are():
    class Constants(Tokens):
        SCALES: ClassVar = {"a": torch.tensor(2.0), 3: 4}
        SEEN: ClassVar = {}

        def forward(self, x):
            global MEAN
            MEAN = MEAN + 0  # looks as if it were a cache
            self.SEEN["last"] = self.SCALES["a"]
            return super().forward(x - MEAN.view(3, 1, 1).to(x.device))

        def get_table(self, x):
            self.SCALES[3] = self.SCALES[3]
            return sum(row.mean().to(x.device) for row in ROWS.values()) * self.SCALES["a"]

    before = [MEAN, dict(ROWS), dict(Constants.SCALES)]
    supernet = convert(Constants(), IMAGES)
    assert supernet.space.max().to_dict() == {"stem": 8, "wide": 12}
    assert MEAN is before[0]
    assert list(map(id, ROWS.values())) == list(map(id, before[1].values()))
    assert before[2] == Constants.SCALES
    assert not Constants.SEEN


def test_all_random_numbers_are_as_before_and_a_trace_always_draws_the_same():
    class Lottery(Tokens):
        def get_table(self, x):
            path = random.random() < 0.5, np.random.rand() < 0.5
            return x if any(path) else self.narrow(self.wide(x))

    spaces = set()
    for seed in range(6):
        random.seed(seed)
        np.random.seed(seed)
        state, numbers = random.getstate(), np.random.get_state()[1].tolist()
        spaces.add(str(convert(Lottery(), IMAGES).space.max()))
        assert random.getstate() == state
        assert np.random.get_state()[1].tolist() == numbers
    assert len(spaces) == 1


def test_the_state_of_a_model_without_caches_is_empty():
    state = OuterState(Tokens())
    assert not state.keep_constants()
    state.restore()


options = ["first"]


class Configured(Tokens):
    def __init__(self, options=()):
        super().__init__()
        self.count = len(options)


def test_an_argument_with_the_name_of_a_global_is_not_that_one():
    state = OuterState(Configured())
    options.append("later")
    state.restore()
    assert options == ["first", "later"]
