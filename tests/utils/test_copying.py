"""Deep copies of models that hold what copy.deepcopy cannot copy."""

import copy
import functools
import math
import threading
from collections import OrderedDict, deque

import pytest
import torch
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert
from timm_autoslim.utils.copying import copy_deeply


class AttributeDict(dict):
    """A dict whose items are its attributes, and that raises a KeyError for all other names."""

    __getattr__ = dict.__getitem__


class Answering:
    """It answers for all names, also before it has what they are read from."""

    def __init__(self, width):
        self.width = width

    def __getattr__(self, name):
        return self._values[name]


class Locked:
    __slots__ = ("lock", "math", "width")

    def __init__(self, width):
        self.width, self.lock, self.math = width, threading.Lock(), math


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.same = config, [config]
        self.a, self.b, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x).relu().flatten(2)
        y = y.view(len(y), self.config.width, *x.shape[2:])
        return self.head(self.b(y).relu().mean((2, 3)))


CONFIGS = {"dict": lambda: AttributeDict(width=16), "answering": lambda: Answering(16), "locked": lambda: Locked(16)}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_in_a_configuration_that_cannot_be_copied_follow(name):
    model, images = randomise(Net(CONFIGS[name]())).eval(), torch.randn(2, 3, 4, 4)
    supernet = convert(model, images[:1])
    widths = supernet.space.from_dict({"a": 5, "b": 3})
    slim = supernet.extract(widths)
    assert (slim.config.width, model.config.width) == (5, 16)
    assert slim.same[0] is slim.config
    with torch.no_grad():
        assert torch.equal(supernet(images, widths), slim(images))
        assert torch.equal(supernet(images), model(images))


def test_copies_share_what_cannot_be_copied():
    model = Net(Locked(16))
    copied = copy_deeply(model)
    assert copied.config is not model.config
    assert (copied.config.lock, copied.config.math) == (model.config.lock, model.config.math)
    memo = {id(model.a.weight): model.a.weight}
    assert copy_deeply(model, memo).a.weight is model.a.weight
    assert len(memo) == 1


class Refusing:
    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


@pytest.mark.parametrize(
    ("value", "text"), [(Refusing(), "there is one of me"), ((i for i in range(3)), "generator"), ({}.keys(), "keys")]
)
def test_what_must_not_be_copied_is_refused(value, text):
    with pytest.raises(TypeError, match=text):
        copy_deeply(Net([value]))


def test_results_of_autograd_in_a_dict_are_copied_without_their_history():
    model = nn.Linear(2, 2)
    model.cache = {"cpu": [model.weight * 2, model.bias + 1]}
    copied = copy_deeply(model)
    assert torch.equal(copied.cache["cpu"][0], model.cache["cpu"][0])
    assert not any(tensor.requires_grad or tensor is other
                   for tensor, other in zip(copied.cache["cpu"], model.cache["cpu"], strict=True))  # fmt: skip
    assert copied.weight.requires_grad


class Trainer:
    """Holds a lock, as an object that several threads use does, and has a hook."""

    def __init__(self):
        self.lock, self.count = threading.Lock(), 0

    def hook(self, module, args, out):
        with self.lock:
            self.count += 1


def keep_in_a_method(model):
    model.a.register_forward_hook(Trainer().hook)


def keep_in_a_partial(model):
    model.a.register_forward_hook(functools.partial(Trainer.hook, Trainer()))


def keep_in_an_attribute(model):
    model.a.lock = threading.Lock()


def keep_in_a_deque(model):
    model.a.locks = deque([{"lock": threading.RLock()}])


@pytest.mark.parametrize("keep", [keep_in_a_method, keep_in_a_partial, keep_in_an_attribute, keep_in_a_deque])
def test_a_model_that_holds_a_lock_is_converted_and_its_supernet_copied(keep):
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 8), b=nn.Linear(8, 2)))
    keep(model)
    supernet, rows = convert(model, torch.zeros(1, 4)), torch.randn(2, 4)
    widths = supernet.space.min()
    pair = {"supernet": supernet, "weight": model.a.weight, "layers": [model.a]}
    copied = copy.deepcopy(pair)
    assert copied["weight"] is copied["supernet"].model.a.weight
    assert copied["layers"][0] is copied["supernet"].model.a
    assert copied["weight"] is not model.a.weight
    assert torch.equal(copied["supernet"](rows, widths), supernet(rows, widths))
    assert torch.equal(supernet.extract(widths)(rows), supernet(rows, widths))
