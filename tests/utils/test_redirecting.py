"""Lambdas, closures and hooks over a model: subnets, extracted models and copies run them over their own modules."""

import copy
import functools
import weakref

import pytest
import torch
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert, load, save
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.utils.copying import copy_deeply

IMAGE = torch.zeros(1, 3, 8, 8)


class Reaching(nn.Module):
    """Runs its layer `b` by way of what a test gives, and scales by a parameter."""

    def __init__(self, reach):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.rand(8))
        self.run = reach(self)

    def forward(self, x):
        return self.o(self.run(self.a(x).relu()).relu())


def close_over_the_layer(model):
    b = model.b
    return lambda x: b(x)


def recurse(model):
    def run(x, depth=2):
        return run(x, depth - 1) if depth else model.b(x)

    return run


def hook(model):
    model.a.register_forward_hook(lambda module, args, out: out * model.scale.view(1, -1, 1, 1))
    return model.b


def hook_before(model):
    model.b.register_forward_pre_hook(lambda module, args: (args[0] * model.scale.view(1, -1, 1, 1),))
    return nn.Sequential(model.b)


def refer_weakly(model):
    model.weak = weakref.ref(model.b)
    return lambda x: model.weak()(x)


def key_by_layers(model):
    model.by_layer = {model.b: 2.0, model.a: model.b, (model.a, model.b): 0.5}
    return lambda x: model.by_layer[model.a](x) * model.by_layer[model.b] * model.by_layer[model.a, model.b]


def close_over_keys(model):
    scales = {model.b: 2.0, model.a: 0.5}
    return lambda x: next(layer(x) * scale for layer, scale in scales.items() if layer is model.b)


WAYS = {
    "lambda over self": lambda model: lambda x: model.b(x),
    "lambda over the layer": close_over_the_layer,
    "default argument": lambda model: lambda x, layer=model.b: layer(x),
    "keyword default": lambda model: lambda x, *, layer=model.b: layer(x),
    "partial of a lambda": lambda model: functools.partial(lambda layer, x: layer(x), model.b),
    "partial over a lambda": lambda model: functools.partial(lambda x: model.b(x)),
    "lambda of a lambda": lambda model: (lambda inner: lambda x: inner(x))(lambda x: model.b(x)),
    "closure over a weight": lambda model: (lambda w: lambda x: model.b(x) * w.view(1, -1, 1, 1))(model.scale),
    "itself": recurse,
    "hook": hook,
    "hook before": hook_before,
    "weak reference": refer_weakly,
    "dict keyed by layers": key_by_layers,
    "closure over a dict keyed by layers": close_over_keys,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_copy_runs_its_own_modules(way, tmp_path):
    model = randomise(Reaching(WAYS[way])).eval()
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    supernet = convert(model, IMAGE)
    assert supernet.space.names == ("a", "b")
    assert not supernet.repairs
    widths, images = supernet.space.uniform(0.5), torch.randn(2, 3, 8, 8)
    slim = supernet.extract(widths)
    with torch.no_grad():
        assert torch.equal(supernet(images), model(images))
        expected = slim(images)
        assert torch.equal(supernet(images, widths), expected)
        if way != "closure over a weight":  # a fresh original is narrowed in place, which reaches modules alone
            save(slim, tmp_path / "slim")
            again = load(tmp_path / "slim", Reaching(WAYS[way])).eval()
            assert torch.equal(again(images), expected)
        copied = copy.deepcopy(supernet)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(slim(images), expected)
        assert torch.equal(copied(images, widths), expected)
    assert all(torch.equal(copied.model.get_parameter(name), value) for name, value in originals.items())


def test_members_of_lists_and_dicts_are_redirected_too():
    model = Reaching(lambda model: model.b)
    model.ways = [lambda: model.b, {"first": (lambda: model.b,)}]
    model.same = model.ways
    copied = copy_deeply(model)
    assert copied.ways[0]() is copied.b
    assert copied.ways[1]["first"][0]() is copied.b
    assert copied.same is copied.ways
    assert model.ways[0]() is model.b


def test_a_function_in_its_own_closure_stays_that_of_the_original():
    model = Reaching(recurse)
    run = model.run
    copied = copy_deeply(model)
    cells = dict(zip(copied.run.__code__.co_freevars, copied.run.__closure__, strict=True))
    assert cells["run"].cell_contents is copied.run
    cells = dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))
    assert cells["run"].cell_contents is run


def test_what_a_hook_collects_outside_of_the_model_stays_where_it_is():
    outputs = []
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].register_forward_hook(lambda module, args, out: outputs.append((module is model[0], out.shape)))
    copy_deeply(model)(torch.ones(1, 2))
    assert outputs == [(True, (1, 3))]


def test_gradients_of_a_subnet_reach_the_weights_through_a_closure():
    model = randomise(Reaching(hook))
    supernet = convert(model, IMAGE)
    supernet(torch.randn(2, 3, 8, 8), supernet.space.uniform(0.5)).sum().backward()
    assert model.scale.grad[:4].all()
    assert not model.scale.grad[4:].any()


class Swapping(nn.Module):
    """Two functions share the cell of a variable, and two a list."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        current, modules = self.second, [self.second]

        def run(x):
            return current(x) + modules[-1](x)

        def swap(module):
            nonlocal current
            current = module

        self.run, self.swap, self.append = run, swap, lambda module: modules.append(module)

    def forward(self, x):
        return self.last(self.run(self.first(x)))


def test_what_functions_share_is_shared_in_copies():
    model, rows = Swapping().eval(), torch.randn(2, 4)
    extracted = convert(model, rows).extract()
    for change in (extracted.swap, extracted.append):
        before = extracted(rows)
        change(nn.Linear(8, 8))
        assert not torch.equal(extracted(rows), before)
    assert model.run.__closure__[0].cell_contents is model.second


def test_nested_data_in_a_closure_is_read_once():
    data = [1]
    for _ in range(60):
        data = [data, data]  # 2 ** 60 leaves
    model = Swapping().eval()
    model.note = lambda: data
    assert replicate(model, Slices({}, {})).note() is data


class Referring(nn.Module):
    """Refers to its layer in every way that a closure or an attribute may."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        features, stack, cycle = {}, [], []
        self.a.register_forward_hook(lambda module, args, out: features.update(out=out))
        self.features, self.stack, self.push = features, stack, stack.append
        modules, frozen, keys = {self.a}, frozenset([self.a]), {self.a: 1}
        self.list_groups = lambda: (modules, frozen, keys)
        cycle.append((cycle, self.a))
        self.find_cycle = lambda: cycle

        def first(n):
            return second(n - 1) if n else self.a

        def second(n):
            return first(n - 1) if n else self.a

        def wrapped():
            return wrapped.inner()

        wrapped.inner = lambda: self.a
        self.first, self.second, self.wrapped = first, second, wrapped

    def forward(self, x):
        self.push(1)
        self.a(x)
        return self.features["out"]


@pytest.mark.parametrize("make", [copy_deeply, lambda model: replicate(model, Slices({}, {}))], ids=["copy", "replica"])
def test_what_a_copy_refers_to_is_its_own(make):
    model = Referring()
    copied = make(model)
    assert copied(torch.ones(1, 2)) is copied.features["out"]
    assert copied.stack == [1]
    assert not model.features
    assert not model.stack
    assert all(set(group) == {copied.a} for group in copied.list_groups())
    assert copied.find_cycle()[0][0] is copied.find_cycle()
    assert copied.find_cycle()[0][1] is copied.a
    assert {copied.first(n) for n in range(4)} | {copied.second(3), copied.wrapped()} == {copied.a}
    assert {model.first(n) for n in range(4)} | {model.wrapped()} == {model.a}
