"""What the model's code passes to functions of torch beside tensors of its run: numbers, texts, names of weights.

A trace knows of a number where it comes from, or takes it for a constant. A subnet must pass what follows from that. If
it passes something else, the trace has lost where the number comes from, as in `2 if float(channels) > 20 else 3`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_autoslim.tracing import scales
from timm_autoslim.tracing.deferred import outside_of_run
from timm_autoslim.tracing.origins import Number, evaluate, strip_origin
from timm_autoslim.tracing.sites import Site

_POWERS = (1, -1, 0.5, -0.5, 2, -2, 0.25, -0.25, 1.5, -1.5)
_PLAIN = (int, float, complex, str, torch.dtype, type(None))
Values = tuple[Any, ...]
Calls = Mapping[Site, Sequence[Values]]  # by place in the code, what each call there got


class TensorName(str):
    """The name of a tensor of the model."""

    __slots__ = ()


def list_values(arguments: Any, names: Mapping[int, str]) -> Iterator[Any]:
    """Yield what a function gets beside tensors of the run.

    Args:
        arguments: what it gets, in tuples, lists and dicts.
        names: by id, the tensors of the model.
    """
    if isinstance(arguments, Tensor):
        name = names.get(id(arguments)) if arguments.is_meta else None
        yield _read_data(arguments) if not arguments.is_meta else None if name is None else TensorName(name)
    elif isinstance(arguments, np.ndarray):
        yield _hash_data(arguments)
    elif isinstance(arguments, _PLAIN):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for value in arguments:
            yield from list_values(value, names)
    elif isinstance(arguments, dict):
        for key, value in arguments.items():
            yield key
            yield from list_values(value, names)
    elif isinstance(arguments, slice):
        yield from (arguments.start, arguments.stop, arguments.step)


def _read_data(tensor: Tensor) -> Any:
    """Return something that stands for a tensor with data that the code brings with it."""
    with outside_of_run():
        return _hash_data(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _hash_data(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@dataclass(frozen=True)
class Expectation:
    """What a subnet passes if the trace knows where all numbers come from.

    Attributes:
        get_size: returns the value of an attribute or a dimension in the subnet.
        attributes: by path, what the subnet has in place of numbers of the widest.
        ratios: returns by path of a module how many of its channels the subnet has, as shares.
        get_attribute: returns an attribute of the widest.
    """

    get_size: Callable[[Number], int]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    ratios: Callable[[str], Collection[float]] = lambda path: ()
    get_attribute: Callable[[str], Any] = lambda path: None

    def find_differing(self, widest: Calls, subnet: Calls) -> set[Site]:
        """Return the places where a subnet calls functions of torch more or less often, or with other values."""
        places = widest.keys() ^ subnet.keys()
        for site in widest.keys() & subnet.keys():
            calls, others = widest[site], subnet[site]
            agreed = (self._agree(a, b, site[0]) for a, b in zip(calls, others, strict=False))
            if len(calls) != len(others) or not all(agreed):
                places.add(site)
        return places

    def _agree(self, widest: Values, subnet: Values, path: str) -> bool:
        if len(widest) != len(subnet):
            return False
        return all(a is b or self._follows(a, b, path) for a, b in zip(widest, subnet, strict=True))

    def _follows(self, value: Any, other: Any, path: str) -> bool:
        """Whether a subnet passes `other` where the widest passes `value`."""
        if isinstance(value, TensorName) or isinstance(other, TensorName):  # a run may put another in its place
            return value is None or other is None or bool(value == other)
        if not isinstance(value, (int, float)) or not isinstance(other, (int, float)):
            return bool(value == other)
        ordinary = strip_origin(value)
        if ordinary == other or (ordinary != ordinary and other != other):
            return True
        if isinstance(value, Number):
            try:
                return math.isclose(evaluate(value, self.get_size), other, rel_tol=1e-6)
            except (ArithmeticError, ValueError):
                return False
        if isinstance(value, scales.AttributeFloat) and value.path in self.attributes:
            ratio = self.attributes[value.path] / self.get_attribute(value.path)
            return math.isclose(other, ordinary * ratio**value.power, rel_tol=1e-5)
        return self._is_share(ordinary, other, path)

    def _is_share(self, value: float, other: float, path: str) -> bool:
        """Whether a number is a power of the number of some channels, such as `0.5 * channels`, in both."""
        if isinstance(value, bool) or not value or not other or value * other < 0:
            return False
        shares = (share**power for share in self.ratios(path) for power in _POWERS)
        return any(math.isclose(other / value, share, rel_tol=1e-9) for share in shares)


def freeze_calls(calls: Mapping[Site, Iterable[Values]]) -> Calls:
    """Return calls that no later run changes."""
    return {site: tuple(values) for site, values in calls.items()}
