"""Operators that run on the CPU, with data, when their result is read: until then they cost nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from timm_autoslim.tracing.ops.schema import tensors_in_lists
from timm_autoslim.tracing.origins import Number

Compute = Callable[[], Tensor | None]


class Memory:
    """What a tensor shares with its views.

    Attributes:
        calls: operators that read it as it is now; they run before anything is written to it.
        unknown: whether anything unknown was written to it.
    """

    __slots__ = ("calls", "unknown")

    def __init__(self) -> None:
        self.calls: list[DeferredCall] = []
        self.unknown = False


class Value:
    """The value of one tensor, computed when it is read.

    Attributes:
        memory: it is shared with views.
        inputs: the values that it is computed from.
        root: the model's tensor on the meta device, if it is the value of one.
        numbers: the numbers with an origin that decide it, or its shape.
    """

    __slots__ = ("_compute", "_result", "inputs", "memory", "numbers", "root")

    def __init__(
        self, compute: Compute, memory: Memory | None = None, inputs: Sequence[Value] = (), root: Tensor | None = None
    ) -> None:
        self.memory, self.inputs, self.root = memory or Memory(), tuple(inputs), root
        self.numbers: list[Number] = []
        self._compute: Compute | None = compute
        self._result: Tensor | None = None

    def evaluate(self) -> Tensor | None:
        """Return the tensor with its data on the CPU; None if they are unknown."""
        if self.memory.unknown:
            return None
        if self._compute is not None:
            self._result, self._compute = self._compute(), None
        return self._result

    def list_roots(self) -> list[Tensor]:
        """Return the model's tensors that it is computed from."""
        return [value.root for value in self._list_sources() if value.root is not None]

    def list_numbers(self) -> list[Number]:
        """Return the numbers with an origin that it is computed from."""
        return [number for value in self._list_sources() for number in value.numbers]

    def _list_sources(self) -> list[Value]:
        """Return this value, and all that it is computed from."""
        sources: dict[int, Value] = {}
        todo = [self]
        while todo:
            value = todo.pop()
            if id(value) not in sources:
                sources[id(value)] = value
                todo.extend(value.inputs)
        return list(sources.values())


class DeferredCall:
    """One operator on tensors whose values are known, to be run on the CPU when a result is read."""

    def __init__(self, func: OpOverload, args: Any, kwargs: dict[str, Any], seed: int) -> None:
        """Prepare the call; `Value`s stand among the arguments in place of tensors."""
        self.func, self.args, self.kwargs, self.seed = func, args, kwargs, seed
        self.inputs = list(_find_values((args, kwargs)))
        self._results: list[Tensor] | None = None

    def get_result(self, index: int) -> Tensor | None:
        """Return one of the tensors that the operator returns; None if one of its inputs is unknown."""
        if self._results is None:
            self._results = tensors_in_lists(self.run())
        return self._results[index] if index < len(self._results) else None

    def run(self) -> Any:
        """Return what the operator returns; None if an input is unknown, or the CPU has no such operator."""
        tensors = {id(value): value.evaluate() for value in self.inputs}
        if any(tensor is None for tensor in tensors.values()):
            return None
        args, kwargs = replace_values((self.args, self.kwargs), lambda value: tensors[id(value)], Value)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        try:
            return _run_with_seed(self.func, args, kwargs, self.seed)
        except Exception:  # such as a type that the CPU does not compute with
            return None


@contextlib.contextmanager
def outside_of_run() -> Iterator[None]:
    """Compute with data inside the block: no mode of the run sees it."""
    with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _run_with_seed(func: OpOverload, args: Any, kwargs: dict[str, Any], seed: int) -> Any:
    if torch.Tag.nondeterministic_seeded in func.tags:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return func(*args, **kwargs)
    out = func(*args, **kwargs)
    if func._schema.name.rpartition("::")[2].removeprefix("new_").startswith("empty"):
        for tensor in tensors_in_lists(out):
            tensor.zero_()  # what stands there otherwise differs from run to run
    return out


def copy_later(tensor: Tensor, dtype: torch.dtype) -> Compute:
    """Return a function that copies the data of a tensor, in this type, to the CPU."""
    return lambda: tensor.detach().to("cpu", dtype, copy=True)


def fill_later(shape: Sequence[int], value: bool | int | float) -> Compute:
    """Return a function that makes a tensor of one value."""
    return lambda: torch.tensor(value).expand(tuple(shape))


def get_later(call: DeferredCall, index: int) -> Compute:
    """Return a function that gets one result of an operator."""
    return lambda: call.get_result(index)


def make_tensor(data: Any, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor of numbers, or None if the type cannot hold them."""
    try:
        return torch.tensor(data, dtype=dtype)
    except Exception:
        return None


def _find_values(arguments: Any) -> Iterator[Value]:
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, (tuple, list)):
        for member in arguments:
            yield from _find_values(member)
    elif isinstance(arguments, Mapping):
        yield from _find_values(list(arguments.values()))


def replace_values(arguments: Any, replace: Callable[[Any], Any], kinds: Any) -> Any:
    """Return nested arguments with others in place of those of these kinds."""
    if isinstance(arguments, kinds):
        return replace(arguments)
    if type(arguments) in (tuple, list):
        return type(arguments)(replace_values(member, replace, kinds) for member in arguments)
    if type(arguments) is dict:
        return {key: replace_values(member, replace, kinds) for key, member in arguments.items()}
    return arguments
