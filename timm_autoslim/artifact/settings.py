"""The settings of modules as JSON can say them, and which of them a forward may read."""

from __future__ import annotations

import dis
import functools
import math
import re
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from timm_autoslim.utils.codes import list_codes, list_names
from timm_autoslim.utils.redirecting import read_cell
from timm_autoslim.utils.ways import list_mentioned

_FEW = 64  # items of a list that is a setting
_MOST_LEVELS = 3  # of functions in each other
# Attributes that are no part of what a model computes in evaluation, by their names: those of training, the choice of
# a kernel, and notes.
_ASIDE = re.compile(
    r"training|drop|momentum|inplace|checkpoint|ckpt|grad|fused?_attn|deploy|export|epoch|loss|criterion"
    r"|smoothing|survival|stochastic|seed|debug|verbose|track_running|(^|_)(counte?r?s?|calls|lr)$"
)
_LABEL = re.compile(r"path|file|url|version|device|dtype|(^|_)(name|task|id)$")  # of texts that are no settings
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)

Setting = bool | int | float | str | tuple[bool | int | float | None, ...]


def read_setting(value: Any, levels: int = _MOST_LEVELS) -> Setting | None:
    """Return an attribute as JSON can say it: a number, a flag, a text, a short list, a function; None if it cannot.

    A function is its name with the constants that it was made with, in as many levels of functions in each other.

    Example:
        >>> def scale_by(factor):
        ...     return lambda x: x * factor
        >>> read_setting(functools.partial(scale_by(2), bias=0.5))
        '<lambda>(bias=0.5, factor=2)'
    """
    if type(value) in (bool, int, str):
        return value  # type: ignore[no-any-return]
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if type(value) in (tuple, list):
        plain = value and len(value) <= _FEW and all(item is None or type(item) in (bool, int, float) for item in value)
        integers = all(type(item) is int for item in value)
        finite = all(not isinstance(item, float) or math.isfinite(item) for item in value)
        return tuple(value) if (plain and finite) or (value and integers) else None
    return _describe_function(value, levels) if levels else None


def is_compared(name: str, value: Any) -> bool:
    """Whether a value of this name may be a part of what a model computes in evaluation."""
    return not (_ASIDE.search(name) or (isinstance(value, str) and _LABEL.search(name)))


def is_torchs(kind: type) -> bool:
    """Whether a class is one of torch's."""
    return kind.__module__.partition(".")[0] == "torch"


def _describe_function(value: Any, levels: int) -> str | None:
    """Return the name of a function, with the constants that it was made with; None if it is none."""
    constants: list[tuple[str, Any]] = []
    while isinstance(value, functools.partial):
        constants += [*((str(index), item) for index, item in enumerate(value.args)), *value.keywords.items()]
        value = value.func
    if not isinstance(value, _FUNCTIONS):
        return None
    if isinstance(value, types.FunctionType) and "<locals>" in value.__qualname__:  # others are as their file says
        constants += _list_constants(value)
    settings = ((name, read_setting(item, levels - 1)) for name, item in constants if is_compared(name, item))
    return f"{value.__name__}({', '.join(f'{name}={item}' for name, item in settings if item is not None)})"


def _list_constants(function: types.FunctionType) -> Iterable[tuple[str, Any]]:
    """Yield the default arguments of a function, and the variables of its closure that it does not change."""
    code = function.__code__
    defaults = function.__defaults__ or ()
    arguments = code.co_varnames[: code.co_argcount]
    yield from zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    steps = (step for part in list_codes(code) for step in dis.get_instructions(part))
    changed = {step.argval for step in steps if step.opname == "STORE_DEREF"}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name not in changed:
            yield name, read_cell(cell)


class ForwardNames:
    """The names in the code of a model's forward, which tell what it cannot read; they are looked for when needed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @functools.cached_property
    def _names(self) -> set[str] | None:
        return list_mentioned(self._model)

    def may_read(self, module: nn.Module, name: str) -> bool:
        """Whether code that runs in the forward may read an attribute of a module."""
        kind = type(module)
        if is_torchs(kind) or self._names is None or name in self._names:
            return True
        bases = [base for base in kind.__mro__ if is_torchs(base) and base is not nn.Module]
        functions = [f for base in bases for f in vars(base).values() if isinstance(f, types.FunctionType)]
        return any(name in list_names(function.__code__) for function in functions)
