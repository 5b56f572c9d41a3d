"""Interrupts at any line of Python that a call runs, and what a model must be after them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Interrupt:
    """A block that counts the lines of Python that run in it, and raises KeyboardInterrupt at one of them.

    Lines count wherever they are: in the library, the model, torch, or Python's own modules.

    Attributes:
        lines: how many lines have run.
        place: the file and line where it raised; None if it did not.

    Example:
        >>> interrupt = Interrupt(2)
        >>> def run():
        ...     first = 1
        ...     second = 2
        >>> interrupt.run(run), interrupt.lines
        (False, 2)
        >>> Interrupt().run(run)
        True
    """

    def __init__(self, line: int = 0) -> None:
        """Raise at this line, counted from 1; at none if it is 0."""
        self.line, self.lines = line, 0
        self.place: str | None = None

    def run(self, action: Callable[[], object]) -> bool:
        """Call a function; return whether it ran to its end."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            action()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
        return True

    def _enter(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code is Interrupt.run.__code__ or self.place is not None:
            return None
        return self._step

    def _step(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if event == "line":
            self.lines += 1
            if self.lines == self.line:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._step if self.place is None else None


class Condition:
    """What a model is: its modules, their flags, hooks and attributes, which tensors they hold, and the values.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = Condition(model)
        >>> model.training = False
        >>> before.list_changes(model)
        ['training of the model']
    """

    def __init__(self, model: nn.Module) -> None:
        self._structure = _read_structure(model)
        self._values = {name: tensor.detach().clone() for name, tensor in _list_tensors(model).items()}

    def list_changes(self, model: nn.Module, *, values: bool = True) -> list[str]:
        """Return what is other than it was; with `values`, also the tensors whose values are."""
        now = _read_structure(model)
        changes = [name for name in (self._structure | now) if self._structure.get(name) != now.get(name)]
        tensors = _list_tensors(model)
        for name, value in self._values.items() if values else ():
            if name in tensors and not _equal(tensors[name], value):
                changes.append(f"the values of {name}")
        return changes


def _read_structure(model: nn.Module) -> dict[str, Any]:
    structure: dict[str, Any] = {}
    for path, module in model.named_modules():
        where = path or "the model"
        structure[f"training of {where}"] = module.training
        structure[f"attributes of {where}"] = frozenset(vars(module))
        numbers = (int, float, bool, str, tuple)
        structure[f"numbers of {where}"] = {k: v for k, v in vars(module).items() if isinstance(v, numbers)}
        structure[f"hooks of {where}"] = [len(vars(module).get(name) or ()) for name in _HOOKS]
        for kind in ("_parameters", "_buffers", "_modules"):
            structure[f"{kind} of {where}"] = {name: id(value) for name, value in vars(module)[kind].items()}
    return structure


def _list_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
