"""The same channels can shrink whatever ran before: forwards that filled caches, other conversions, random numbers."""

import functools
import random

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from torch import nn

from timm_autoslim import convert, cost


def compute_shape(batch, tokens, heads, channels):
    return batch, tokens, heads, channels // heads


def memoise(function):
    results = {}

    @functools.wraps(function)
    def call(*args):
        if args not in results:
            results[args] = function(*args)
        return results[args]

    return call


def read_table(*args):
    if not hasattr(read_table, "results"):
        read_table.results = {}
    return read_table.results.setdefault(args, compute_shape(*args))


class Results:
    def __init__(self):
        self.by_size = {}

    def get(self, *args):
        if args not in self.by_size:
            self.by_size[args] = compute_shape(*args)
        return self.by_size[args]


lru_cached = functools.lru_cache(compute_shape)
memoised = memoise(compute_shape)
REGISTRY = {"shape": functools.lru_cache(compute_shape)}
RESULTS = Results()


class Attention(nn.Module):
    """Attention that takes the shape of its heads from a cache."""

    def __init__(self, get, dim=32, heads=2):
        super().__init__()
        self.get, self.heads, self.dim, self.scale = get, heads, dim, (dim // heads) ** -0.5
        self.stem, self.qkv = nn.Conv2d(3, dim, 4, 4), nn.Linear(dim, 3 * dim, bias=False)
        self.out, self.head = nn.Linear(dim, dim), nn.Linear(dim, 5)
        self.cached, self.partial = functools.lru_cache(compute_shape), functools.partial(lru_cached)
        self.by_size, self.results, self.key, self.shape = {}, Results(), None, None

    @functools.lru_cache  # noqa: B019 - it is what models do
    def method(self, batch, tokens, channels):
        return compute_shape(batch, tokens, self.heads, channels)

    @staticmethod
    @functools.cache
    def static(*args):
        return compute_shape(*args)

    @functools.cached_property
    def head_dim(self):
        return self.dim // self.heads

    def remember(self, *args):
        if self.key != args:
            self.key, self.shape = args, compute_shape(*args)
        return self.shape

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (t.reshape(self.get(self, *t.shape)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(((q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


CACHES = {
    "none": lambda s, b, n, c: compute_shape(b, n, s.heads, c),
    "lru_cache": lambda s, b, n, c: lru_cached(b, n, s.heads, c),
    "lru_cache in a dict": lambda s, b, n, c: REGISTRY["shape"](b, n, s.heads, c),
    "a closure": lambda s, b, n, c: memoised(b, n, s.heads, c),
    "an attribute of a function": lambda s, b, n, c: read_table(b, n, s.heads, c),
    "an object": lambda s, b, n, c: RESULTS.get(b, n, s.heads, c),
    "lru_cache of a module": lambda s, b, n, c: s.cached(b, n, s.heads, c),
    "a partial of a module": lambda s, b, n, c: s.partial(b, n, s.heads, c),
    "a dict of a module": lambda s, b, n, c: s.by_size.setdefault((b, n, s.heads, c), compute_shape(b, n, s.heads, c)),
    "an object of a module": lambda s, b, n, c: s.results.get(b, n, s.heads, c),
    "attributes of a module": lambda s, b, n, c: s.remember(b, n, s.heads, c),
    "a method": lambda s, b, n, c: s.method(b, n, c),
    "a static method": lambda s, b, n, c: s.static(b, n, s.heads, c),
    "a cached property": lambda s, b, n, c: (b, n, s.heads, s.head_dim),
}
QUICK_CACHES = ["lru_cache", "an object", "a dict of a module"]


@pytest.mark.parametrize("name", slow_but(QUICK_CACHES, list(CACHES)))
def test_a_forward_before_changes_nothing(name):
    spaces = []
    for batch in (None, 1, 2):
        model = Attention(CACHES[name]).eval()
        if batch:
            model(torch.randn(batch, 3, 16, 16))
        supernet, images = convert(model, torch.zeros(1, 3, 16, 16)).eval(), torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            supernet(images)  # fills the model's caches at full width
            widths = supernet.space.uniform(0.5)
            assert torch.equal(supernet(images, widths), supernet.extract(widths).eval()(images))
        assert cost(supernet, widths).macs < 0.45 * cost(supernet).macs
        spaces.append((supernet.space.max().to_dict(), supernet.repairs))
    assert spaces[0] == spaces[1] == spaces[2]


tables = functools.lru_cache(lambda n: torch.linspace(0, 1, n))


def test_a_table_on_the_cpu_that_is_cached_is_no_table_of_the_meta_device_afterwards():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            return self.head((self.conv(x) * tables(x.shape[-1])).mean((2, 3)))

    for _ in range(2):
        model = Net().eval()
        supernet = convert(model, torch.zeros(1, 3, 8, 8))
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
        assert cost(supernet, batch_size=1).peak_bytes
        assert tables(8).device.type == "cpu"


# -- random numbers ---------------------------------------------------------------------------------------------------

PYTHON, NUMPY, OLD, TORCH = random.Random(), np.random.default_rng(), np.random.RandomState(), torch.Generator()
GENERATORS = [random.Random()]


class Skipping(nn.Module):
    """A network that leaves layers out at random while it trains."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.stem, self.head = draw, nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1)) for _ in "abcd")
        self.python, self.numpy, self.torch = random.Random(), np.random.default_rng(), torch.Generator()
        self.torch.seed()
        self.several = [np.random.RandomState()]

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x if self.training and self.draw(self) < 0.5 else x + layer(x)
        return self.head(x.relu().mean((2, 3)))


DRAWS = {
    "random": lambda s: random.random(),
    "numpy": lambda s: np.random.rand(),
    "torch": lambda s: torch.rand(()).item(),
    "a condition": lambda s: torch.rand(1),
    "bernoulli": lambda s: float(torch.empty(1).bernoulli_(0.5)),
    "randperm": lambda s: torch.randperm(10).tolist()[0] / 10,
    "a global generator": lambda s: PYTHON.random(),
    "a global generator of numpy": lambda s: NUMPY.random(),
    "an old generator of numpy": lambda s: OLD.rand(),
    "a global generator of torch": lambda s: torch.rand((), generator=TORCH).item(),
    "a generator in a list": lambda s: GENERATORS[0].random(),
    "the module's": lambda s: s.python.random(),
    "the module's of numpy": lambda s: s.numpy.random(),
    "the module's of torch": lambda s: torch.rand((), generator=s.torch).item(),
    "one of the module's": lambda s: s.several[0].rand(),
    "a new one": lambda s: np.random.default_rng().random(),
}
QUICK_DRAWS = ["numpy", "torch", "a generator in a list"]


@pytest.mark.parametrize("name", slow_but(QUICK_DRAWS, list(DRAWS)))
def test_random_numbers_change_nothing(name):
    spaces = []
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        PYTHON.seed(seed)
        TORCH.manual_seed(seed)
        before = PYTHON.getstate(), NUMPY.bit_generator.state, OLD.rand.__self__.get_state()[2], TORCH.get_state()
        supernet = convert(Skipping(DRAWS[name]), torch.zeros(2, 3, 8, 8))
        assert PYTHON.getstate() == before[0]
        assert NUMPY.bit_generator.state == before[1]
        assert OLD.get_state()[2] == before[2]
        assert torch.equal(TORCH.get_state(), before[3])
        spaces.append((supernet.space.max().to_dict(), supernet.repairs))
    assert spaces == [spaces[0]] * 3
    assert len(spaces[0][0]) == 5
    assert not spaces[0][1]
