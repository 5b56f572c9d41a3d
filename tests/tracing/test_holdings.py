"""What modules hold beside weights."""

import functools

import torch
from torch import nn

from timm_autoslim.tracing.holdings import list_attributes, list_values
from timm_autoslim.tracing.origins import FromAttribute
from timm_autoslim.tracing.sizes import Size


class Slotted:
    __slots__ = ("slot",)


class Part(Slotted):
    def __init__(self, **members):
        self.slot = 1
        self.__dict__.update(members)


def make_function(value):
    def function():
        return value

    function.mark = 5
    return function


def make_module():
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Identity())
    module[2].late = 3
    module.part = Part(w=2.0, inner=Part(table={"a": [torch.ones(1)]}))
    module.function, module.partial = make_function(7), functools.partial(print, Part(x=6))
    module.text, module.flag = "text", True
    module.register_buffer("buffer", torch.ones(2), persistent=False)
    module.part.back = module.part
    return module


def test_attributes_of_modules_and_of_what_they_hold():
    module = make_module()
    values = {(a.path, a.name): a.read() for a in list_attributes(module)}
    numbers = {place: value for place, value in values.items() if isinstance(value, (int, float))}
    assert numbers == {
        ("2", "late"): 3,
        ("", "part.w"): 2.0,
        ("", "part.slot"): 1,
        ("", "part.inner.slot"): 1,
        ("", "function.value"): 7,
        ("", "function.mark"): 5,
        ("", "partial.x"): 6,
        ("", "partial.slot"): 1,
    }
    assert ("", "buffer") in values
    assert [place for place, _ in list_values(values["", "part.inner.table"])] == ["['a'][0]"]


def test_attributes_are_written_and_removed():
    module = make_module()
    attributes = {a.name: a for a in list_attributes(module)}
    for name in ("part.w", "part.slot", "function.value", "function.mark", "late"):
        attributes[name].write(9)
        assert attributes[name].read() == 9
    assert module.function() == 9
    for name in ("part.w", "part.slot", "function.mark", "buffer"):
        attributes[name].remove()
    assert not hasattr(module.part, "w")
    assert not hasattr(module.part, "slot")


def test_a_number_under_a_size_is_a_table():
    size = Size(8, FromAttribute("a"))
    table = {size: 1, (size, "x"): 2, 8.5: 3, "y": torch.ones(1)}
    assert [place for place, _ in list_values(table)] == ["[8.5]", "['y']"]
    assert list(list_values([True, "x", None])) == []
