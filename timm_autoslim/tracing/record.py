"""The one recorder: a run on the meta device, of which every module, torch function and operator is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim.errors import TraceError
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.describe import Describer
from timm_autoslim.tracing.flow import Call, Flow
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.tracing.sizes import FromExpression, Size
from timm_autoslim.utils.meta import fix_seed, run_model
from timm_autoslim.utils.running import ModuleStack
from timm_autoslim.utils.tensors import collect_tensors


class Recorder:
    """Runs a model on the meta device, and sees every module, torch function and operator of the run.

    What is done with them is up to subclasses: they extend `enter`, `leave`, `function` and `operator`.

    Attributes:
        model: a meta copy.
        stack: its modules that run now.
    """

    def __init__(self, model: nn.Module, stack: ModuleStack | None = None) -> None:
        self.model, self.stack = model, ModuleStack() if stack is None else stack
        self.stack.follow(model, self.enter, self.leave)
        self._functions = _Functions(self)

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module starts."""

    def leave(self, path: str, module: nn.Module, out: Any) -> None:
        """A module returns."""

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function. Recurrent layers are taken whole: unrolled they would make thousands of operators."""
        if getattr(func, "__name__", "") in recurrent.LAYERS:
            return recurrent.outputs(args, kwargs)
        return func(*args, **kwargs)

    def operator(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an ATen operator on meta tensors."""
        return ops.execute(func, args, kwargs)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """See what runs inside the block; without gradients, and with the same random numbers each time."""
        with torch.no_grad(), fix_seed(), self._functions, _Operators(self):
            yield

    def run(self, example: Any) -> Any:
        """Run the model on an example: a tensor, a tuple or a dict of inputs."""
        with self.recording():
            return run_model(self.model, example)


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.function(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.operator(func, args, kwargs or {})


# -- what a trace records -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One operator of a recorded run, with every label that it read or set."""

    name: str
    path: str
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class Exit:
    """What left one module in a recorded run: the shape and the labels of every tensor."""

    path: str
    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[Label, ...], ...]


@dataclass(frozen=True)
class Record:
    """One recorded run of the widest."""

    training: bool
    operations: tuple[Operation, ...]
    exits: tuple[Exit, ...]


# Functions of torch that do arithmetic on sizes of their own.
_COMPOSITES = ("multi_head_attention_forward",)


@cache
def _unguarded(function: Any) -> Any:
    """Return a copy of a Python function of torch that does not hand itself to the mode that calls it."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class LabelRecorder(Recorder):
    """Carries labels through a run: hands out sizes that know their dimension, and applies the operators' rules.

    Attributes:
        last_path, last_shapes: the module that was entered last, and the shapes of the tensors that entered it.
        used: ids of the tensors that an operator or function read.
    """

    def __init__(self, model: nn.Module, flow: Flow, foreign: frozenset[int], describer: Describer) -> None:
        """Start recording.

        Args:
            model: a meta copy whose integers know where they come from.
            flow: the state of the trace.
            foreign: ids of the tensors of the user's model, which no operator may read.
            describer: told of every module that is entered and left.
        """
        super().__init__(model, flow.stack)
        self.flow, self.foreign, self.describer = flow, foreign, describer
        self.last_path, self.last_shapes = "", list[tuple[int, ...]]()
        self.used: set[int] = set()
        self._operations: list[Operation] = []
        self._exits: list[Exit] = []

    def start(self) -> None:
        """Forget the run before."""
        self._operations.clear()
        self._exits.clear()
        self.describer.start()

    def record(self) -> Record:
        """Return what was recorded since `start`."""
        return Record(self.model.training, tuple(self._operations), tuple(self._exits))

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the describer of the module, and remember it for error messages."""
        tensors = collect_tensors([args, kwargs])
        self.last_path, self.last_shapes = path, [tuple(t.shape) for t in tensors]
        if tensors:
            self.describer.enter(path, module, self.flow.labels(tensors[0]))

    def leave(self, path: str, module: nn.Module, out: Any) -> None:
        """Record what the module returns."""
        tensors = collect_tensors(out)
        labels = tuple(tuple(self.flow.labels(t)) for t in tensors)
        self._exits.append(Exit(path, tuple(tuple(t.shape) for t in tensors), labels))
        self.describer.leave(path, module, labels)

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function, and note it with its arguments as the model's code wrote them."""
        name = getattr(func, "__name__", str(func))
        if name == "size" or (name == "__get__" and func == Tensor.shape.__get__):  # type: ignore[attr-defined]
            return self._sizes(func(*args, **kwargs), args[0], *args[1:], *kwargs.values())
        if name in ("numel", "nelement"):
            return self._number(func(*args, **kwargs), args[0])
        before, self.flow.call = self.flow.call, Call(name, tuple(args), kwargs)
        try:
            if name in _COMPOSITES:
                with self._functions:
                    return _unguarded(func)(*args, **kwargs)
            if name in ("layer_norm", "rms_norm"):  # decomposed before an operator could see the shape asked for
                shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
                for label, size in zip(self.flow.labels(args[0])[-len(shape) :], shape, strict=True):
                    self.flow.constrain(label, size)
            if name in recurrent.LAYERS:
                self.used.update(id(t) for t in ops.tensors_in_lists([*args, *kwargs.values()]))
                return recurrent.run(self.flow, name, args, kwargs)
            return func(*args, **kwargs)
        finally:
            self.flow.call = before

    def _number(self, number: int, tensor: Tensor) -> int:
        dims = tuple(size for size in self.flow.sizes(tensor) if isinstance(size, Size))
        return Size(number, FromExpression(dims, len(dims) == 1, dims)) if dims else number

    def _sizes(self, shape: Any, tensor: Tensor, *dim: int) -> Any:
        sizes = self.flow.sizes(tensor)
        return sizes[dim[0]] if isinstance(shape, int) else torch.Size(sizes)

    def operator(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator and its rule, and record which labels it read and set."""
        tensors = ops.tensors_in_lists([*args, *kwargs.values()])
        if not self.foreign.isdisjoint(map(id, tensors)):
            raise TraceError(
                f"{self.flow.path or 'the model'}: its forward runs on the weights of this very model in a copy too (a "
                "lambda or closure over the model was put in place of forward?); needed: a forward that finds its "
                "weights through self, such as types.MethodType(function, model)"
            )
        out = super().operator(func, args, kwargs)
        self.used.update(id(t) for t in tensors)
        inputs = [label for t in tensors for label in self.flow.labels(t)]
        ops.run(self.flow, func, args, kwargs, out)
        outputs = [label for t in ops.tensors_in_lists(out) for label in self.flow.labels(t)]
        labels = {id(v): v for v in [*inputs, *outputs] if v is not None}
        self._operations.append(Operation(str(func), self.flow.path, tuple(labels.values())))
        return out
