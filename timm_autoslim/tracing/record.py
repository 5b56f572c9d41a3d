"""The recorder of runs on the meta device: every module, torch function and operator passes through it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim.tracing import ops
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.tracing.origins import Number
from timm_autoslim.tracing.sites import Site, find_site
from timm_autoslim.tracing.values import KnownValues
from timm_autoslim.utils.meta import fix_seed, list_generators, run_model
from timm_autoslim.utils.running import ModuleStack
from timm_autoslim.utils.tensors import named_tensors


class Recorder:
    """Runs a model on the meta device, and calls a method for every module, torch function and operator of the run.

    Subclasses extend `enter`, `leave`, `run_function` and `run_operator`.

    Attributes:
        model: a meta copy.
        stack: its modules that are running.
        sites: where its code has called functions of torch; None for torch's own.
    """

    def __init__(
        self, model: nn.Module, stack: ModuleStack | None = None, data: Mapping[str, Tensor] | None = None
    ) -> None:
        """Prepare a model.

        Args:
            model: a meta copy, or a replica of one.
            stack: it follows the modules that run.
            data: by name, the tensors with data; the model's code may read those that have the shape of its own.
        """
        self.model, self.stack = model, ModuleStack() if stack is None else stack
        tensors = {n: t for n, t in named_tensors(model).items() if n in (data or {})}
        self.values = KnownValues([(t, (data or {})[n]) for n, t in tensors.items()], self.note_read, self.check_tensor)
        self.sites: set[Site | None] = set()
        self.stack.follow(model, self.enter, self.leave)
        self._function_mode = _FunctionMode(self)

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Do something when a module starts; by default nothing."""

    def leave(self, path: str, module: nn.Module, out: Any) -> None:
        """Do something when a module returns; by default nothing."""

    def note_read(self, tensors: Sequence[Tensor], numbers: Sequence[Number]) -> None:
        """Do something when the model's code reads what follows from these tensors and sizes; by default nothing."""

    def check_tensor(self, tensor: Tensor) -> None:
        """Do something about a tensor with data that the model's code brings with it; by default nothing."""

    def run_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function. A recurrent layer runs as one step: as operators it would be thousands."""
        if getattr(func, "__name__", "") in recurrent.LAYERS:
            return recurrent.make_outputs(args, kwargs)
        return func(*args, **kwargs)

    def run_operator(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an ATen operator on meta tensors."""
        return ops.execute(func, args, kwargs)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside the block, without gradients and with the same random numbers each time."""
        with torch.no_grad(), fix_seed(list_generators(self.model)), self._function_mode, _OperatorMode(self):
            yield

    def run(self, example: Any) -> Any:
        """Run the model on an example: a tensor, a tuple or a dict of inputs."""
        with self.recording():
            return run_model(self.model, example)

    def release(self) -> None:
        """Let go of the model, so that it is freed at once, not by a search for cycles; this recorder runs no more."""
        self.stack.release()
        self.__dict__.clear()


class _FunctionMode(TorchFunctionMode):
    """Hands every torch function to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = self.recorder
        recorder.sites.add(find_site(recorder.stack.path, sys._getframe(1)))
        return recorder.values.run_function(func, args, kwargs or {}, recorder.run_function)


class _OperatorMode(TorchDispatchMode):
    """Hands every operator to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.values.run_operator(func, args, kwargs or {}, self.recorder.run_operator)
