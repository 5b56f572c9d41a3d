"""What code can read is told by the names in it: through objects by their names, through containers by every way."""

import contextlib
import contextvars
import functools
import itertools
import queue
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from timm_autoslim.utils.ways import Walk, find_strangers


class Trainer:
    """Holds a model, as a trainer does, and a list."""

    def __init__(self, model):
        self.model, self.log = model, []

    def read(self):
        return self.model.a

    def collect(self):
        self.log.append(1)

    def read_by_name(self):
        return getattr(self, "mo" + "del")

    def read_later(self):
        return self._find().a

    def _find(self):
        return self.model

    def __getitem__(self, name):
        return self.model


class Slotted:
    __slots__ = ("model",)


TRAINER = SimpleNamespace()


def make_model():
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})


def find(model, start, names=()):
    """Return the parts of the model that code reaches, with the ways to them."""
    ends = {id(module): name for name, module in model.named_modules() if name}
    return Walk(ends, set(), model).find([(start, "")], names)


class Net(nn.Module):
    """A model of a class that names its layers, as most do; a ModuleDict can be indexed by anything."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


def test_objects_are_followed_by_the_names_in_the_code():
    trainer = Trainer(Net())
    assert find(trainer.model, trainer.read) == {"a": "Trainer.model.a"}
    assert find(trainer.model, trainer.collect) == {}
    assert set(find(trainer.model, trainer.read_later)) == {"a"}
    assert set(find(trainer.model, trainer.read_by_name)) == {"a", "b"}


def slots(model):
    slotted = Slotted()
    slotted.model = model
    return lambda: slotted.model


def function_attribute(model):
    def run():
        return run.model

    run.model = model
    return run


def a_global(model):
    TRAINER.model = model
    return lambda: TRAINER.model


def late_code(model):
    """The code that mentions `model` is found after the object that holds it."""
    trainer = Trainer(model)
    return lambda: read(trainer)


def read(trainer):
    return trainer.model


def outer_module(model):
    outer = nn.Module()
    outer.net = model
    return lambda: outer.net


def a_class(model):
    class Place:
        net = model

    return lambda: Place.net


def decorated(model):
    """The wrapper, which mentions the model, is one method; what it wraps is another function."""
    net = model

    def decorate(function):
        return functools.wraps(function)(lambda self: net)

    class Place:
        @decorate
        def get(self):
            return None

    place = Place()
    return lambda: place.get()


class Dict(dict):
    pass


def thread_local(model):
    place = threading.local()
    place.net = model
    return lambda: place.net


def context_variable(model):
    place = contextvars.ContextVar("net")
    place.set(model)
    return lambda: place.get()


def array(model):
    models = np.empty(1, object)
    models[0] = model
    return lambda: models[0]


def in_a_queue(model):
    models = queue.Queue()
    models.put(model)
    return lambda: models.get()


WAYS = {
    "closure": lambda model: lambda: model,
    "default": lambda model: lambda net=model: net,
    "keyword default": lambda model: lambda *, net=model: net,
    "list": lambda model: (lambda nets: lambda: nets[0])([{"net": (model,)}]),
    "set": lambda model: (lambda nets: lambda: nets)({model}),
    "own kind of dict": lambda model: (lambda nets: lambda: nets)(Dict(net=model)),
    "key": lambda model: (lambda nets: lambda: nets)({model: 1}),
    "partial": lambda model: functools.partial(lambda net: net, model),
    "cached function": lambda model: functools.lru_cache(lambda: model),
    "bound method of a dict": lambda model: {"net": model}.get,
    "iterator": lambda model: (lambda nets: lambda: next(nets))(itertools.cycle([model])),
    "generator": lambda model: (lambda nets: lambda: next(nets))(net for net in [model]),
    "weak reference": lambda model: (lambda ref: lambda: ref())(weakref.ref(model)),
    "weak proxy": lambda model: (lambda proxy: lambda: proxy)(weakref.proxy(model)),
    "weak dict": lambda model: (lambda nets: lambda: nets)(weakref.WeakValueDictionary({"net": model})),
    "special method": lambda model: (lambda trainer: lambda: trainer["net"])(Trainer(model)),
    "slots": slots,
    "function attribute": function_attribute,
    "global": a_global,
    "late code": late_code,
    "outer module": outer_module,
    "class": a_class,
    "decorated method": decorated,
    "thread": thread_local,
    "context variable": context_variable,
    "array of objects": array,
    "queue": in_a_queue,
    "context": lambda model: (lambda context: lambda: context.__enter__())(contextlib.nullcontext(model)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_found(way):
    model = make_model()
    assert set(find(model, WAYS[way](model))) == {"a", "b"}


def test_what_is_called_runs_its_forward():
    class Outer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net.a(x)

    outer = Outer(Net())
    assert find(outer.net, lambda x: outer(x)) == {"a": "outer.net.a"}


def test_code_of_torch_and_python_is_not_read():
    model = Net()
    holder = SimpleNamespace(model=model)
    assert find(model, functools.partial(nn.functional.relu, holder)) == {}


def test_strangers_are_parts_of_other_models():
    model, other = Net(), Net()
    model.a.register_forward_hook(lambda module, args, out: (out, model.b, other.b.weight))
    assert {way for _, way in find_strangers(model)} == {"other", "other.b", "other.b.weight", "other.b.bias"}
