"""The stack of modules that run: innermost last, whatever they return or raise."""

import pytest
import torch
from torch import nn

from timm_autoslim.utils.running import ModuleStack


class Raising(nn.Module):
    def forward(self, x):
        raise ArithmeticError


def follow(model):
    """Return a stack that follows the model, and the list of its events."""
    stack, events = ModuleStack(), []
    stack.follow(
        model,
        enter=lambda path, module, args, kwargs: events.append(("enter", path, list(stack.paths), args, kwargs)),
        leave=lambda path, module, out: events.append(("leave", path, stack.path, out)),
    )
    return stack, events


def test_modules_are_entered_and_left_in_their_order():
    model, x = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity())), torch.zeros(1)
    stack, events = follow(model)
    assert stack.idle
    model(x)
    assert [event[:2] for event in events] == [
        ("enter", ""), ("enter", "0"), ("leave", "0"), ("enter", "1"), ("enter", "1.0"), ("leave", "1.0"),
        ("leave", "1"), ("leave", ""),
    ]  # fmt: skip
    assert events[4] == ("enter", "1.0", ["", "", "1", "1.0"], (x,), {})
    assert events[5] == ("leave", "1.0", "1", x)
    assert stack.idle
    assert stack.paths == [""]
    assert stack.interrupted is None


def test_arguments_by_name_are_told():
    layer = nn.Identity()
    _, events = follow(layer)
    layer(input=3)
    assert events[0] == ("enter", "", ["", ""], (), {"input": 3})


def test_an_exception_empties_the_stack_and_names_the_innermost_module():
    model = nn.Sequential(nn.Identity(), nn.Sequential(Raising()))
    stack, events = follow(model)
    with pytest.raises(ArithmeticError):
        model(torch.zeros(1))
    assert stack.idle
    assert stack.interrupted == "1.0"
    assert [path for kind, path, *_ in events if kind == "leave"] == ["0"]
    model[0](torch.zeros(1))
    assert stack.interrupted is None


def test_a_module_that_catches_the_exception_goes_on():
    class Catching(nn.Sequential):
        def forward(self, x):
            try:
                return super().forward(x)
            except ArithmeticError:
                return x

    model = Catching(Raising())
    stack, _ = follow(model)
    model(torch.zeros(1))
    assert stack.idle
    assert stack.interrupted is None


def test_after_release_nothing_is_followed():
    model = nn.Sequential(nn.Identity())
    stack, events = follow(model)
    stack.release()
    model(torch.zeros(1))
    assert events == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
