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
from timm_autoslim.tracing.answers import OF_GRADIENTS, QUESTIONS, answer_gradients, answer_place
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.tracing.origins import Number
from timm_autoslim.tracing.passing import Values, list_values
from timm_autoslim.tracing.sites import Site, find_model_site, find_site
from timm_autoslim.tracing.values import KnownValues
from timm_autoslim.tracing.watching import note_gradients
from timm_autoslim.utils.meta import fix_seed, list_generators, run_model
from timm_autoslim.utils.running import ModuleStack
from timm_autoslim.utils.tensors import named_tensors


class Recorder:
    """Runs a model on the meta device, and calls a method for every module, torch function and operator of the run.

    Subclasses extend `enter`, `leave`, `run_function` and `run_operator`.

    Attributes:
        model: a meta copy.
        stack: its modules that are running.
        names: by id, its tensors that have data.
        calls: by place in its code, what it has passed to functions of torch.
        gradients: whether it runs with gradients enabled, though nothing asks for any.
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
        self._tensors = named_tensors(model)
        tensors = {n: t for n, t in self._tensors.items() if n in (data or {})}
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        learned = (n for n, t in self._tensors.items() if (data or {}).get(n, t).requires_grad)
        self._learned = {id(self._tensors[name]) for name in learned}
        self._device = next((t.device for t in (data or {}).values() if not t.is_meta), torch.device("cpu"))
        self.values = KnownValues([(t, (data or {})[n]) for n, t in tensors.items()], self.note_read, self._take_tensor)
        self.calls: dict[Site, list[Values]] = {}
        self.gradients = False
        self._is_inside = False  # of a function of torch whose calls are followed too
        self._depth = 0  # of functions of torch that run
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

    def _take_tensor(self, tensor: Tensor) -> None:
        """Note a tensor with data that the model's code brings with it, as from numpy."""
        self.check_tensor(tensor)
        site = find_model_site(self.stack.path, sys._getframe(1)) if not self._depth else None
        if site is not None:
            self.note_call(site, (tensor,), {})

    def note_call(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the model's code passes to a function of torch."""
        self.calls.setdefault(site, []).append(tuple(list_values((args, kwargs), self.names)))

    def answer(self, question: str, tensor: Tensor) -> Any:
        """Return where a tensor of the run is, or whether it has a gradient, as in a run with data."""
        if question in OF_GRADIENTS:
            note_gradients()
            is_weight = id(tensor) in self._learned
            return answer_gradients(question, is_weight, not is_weight and self.gradients and torch.is_grad_enabled())
        return answer_place(question, tensor, self._device)

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
        """Record what runs inside the block, with the same random numbers each time."""
        generators, gradients = list_generators(self.model), torch.set_grad_enabled(self.gradients)
        with gradients, fix_seed(generators), self._function_mode, _OperatorMode(self):
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
        recorder, frame = self.recorder, sys._getframe(1)
        site = find_site(recorder.stack.path, frame)
        if site is not None and not recorder._is_inside:
            recorder.note_call(site, args, kwargs or {})
        if func in QUESTIONS and site is not None and site[1] is frame.f_code and (len(args) + len(kwargs or {})) == 1:
            return recorder.answer(QUESTIONS[func], args[0])
        recorder._depth += 1
        try:
            return recorder.values.run_function(func, args, kwargs or {}, recorder.run_function)
        finally:
            recorder._depth -= 1


class _OperatorMode(TorchDispatchMode):
    """Hands every operator to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.values.run_operator(func, args, kwargs or {}, self.recorder.run_operator)
