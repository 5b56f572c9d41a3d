"""Run two models on many batches side by side, and stop all runs at the same layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from timm_autoslim.errors import ConfigError

_CURRENT = threading.local()  # `run`: what this thread runs

# What is alive besides the inputs and outputs of one layer: residual sums and other branches.
_ALIVE = 3
_LARGEST_BATCH = 32


class _Cancelled(BaseException):
    """Ends a run that is not wanted any more."""


class _Run:
    """One forward, in a thread of its own, that stops whenever it reaches a module that stops it."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._stop: tuple[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._work, args=(model, images), daemon=True)
        self._thread.start()

    def _work(self, model: nn.Module, images: Tensor) -> None:
        self._go.acquire()
        _CURRENT.run = self
        try:
            if not self._cancelled:
                with torch.no_grad():
                    model(images)
        except _Cancelled:
            pass
        except BaseException as error:  # raised in the thread that waits
            self._error = error
        self._stop = None
        self._stopped.release()

    def pause(self, name: str, tensor: Tensor) -> None:
        """Stop here, with the tensor that is looked at, until `advance` is called."""
        self._stop = name, tensor
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def advance(self) -> tuple[str, Tensor] | None:
        """Run to the next stop; return the module's path and the tensor there, or None at the end."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def cancel(self) -> None:
        """End the run where it stands."""
        self._cancelled = True
        self._go.release()
        self._thread.join()


class Lockstep:
    """All runs of a slim model and of its original, stopped layer by layer.

    As a context it registers hooks, and at its end removes them and ends all runs. As an iterator it yields the path of
    every stop of the slim model in the order of its forward, with what enters there and, for layers, what comes out of
    the original's layer: a list of tensors each, one for each batch.

    Attributes:
        images: how many images run; more join as layers become smaller.
    """

    def __init__(
        self, slim: nn.Module, original: nn.Module, layers: Sequence[str], norms: Sequence[str], sizes: Sequence[int],
        images: Iterator[Tensor], memory: int,
    ) -> None:  # fmt: skip
        """Take the models, and where they stop.

        Args:
            slim, original: the models, in evaluation mode.
            layers: paths of modules at which both stop.
            norms: paths of modules at which the slim model stops.
            sizes: by stop, the bytes of one image that its layer and all later ones have at most.
            images: batches (N, C, H, W).
            memory: how many bytes activations may take.
        """
        self.slim, self.original = slim, original
        self._layers, self._norms = frozenset(layers), frozenset(norms)
        self._capacities = [max(1, memory // (2 * _ALIVE * size)) for size in sizes]  # in images
        self._batches = _divide(images, max(1, min(_LARGEST_BATCH, self._capacities[0] // 4)))
        self._runs: list[tuple[_Run, _Run]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.images = 0

    def __enter__(self) -> Lockstep:
        try:
            for name in (*self._layers, *self._norms):
                module = self.slim.get_submodule(name)
                self._handles.append(module.register_forward_pre_hook(_make_input_hook(name)))
            for name in self._layers:
                module = self.original.get_submodule(name)
                self._handles.append(module.register_forward_hook(_make_output_hook(name)))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for pair in self._runs:
            for run in pair:
                run.cancel()

    def __iter__(self) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
        passed: list[str] = []
        self._admit(passed)
        while True:
            stops = [slim.advance() for slim, _ in self._runs]
            name = stops[0][0] if stops[0] else None
            if any((stop[0] if stop else None) != name for stop in stops):
                raise _make_path_error(name)
            if name is None:
                return
            passed.append(name)
            stops += self._admit(passed)
            outputs = [self._find_output(original, name) for _, original in self._runs] if name in self._layers else []
            yield name, [stop[1] for stop in stops if stop], outputs

    def _admit(self, passed: list[str]) -> list[tuple[str, Tensor] | None]:
        """Start runs of further batches as long as they fit, and let them come to where the others stand."""
        capacity = self._capacities[max(0, len(passed) - 1)]
        stops: list[tuple[str, Tensor] | None] = []
        while self.images < capacity and (batch := next(self._batches, None)) is not None:
            pair = _Run(self.slim, batch), _Run(self.original, batch)
            self._runs.append(pair)
            self.images += len(batch)
            stop: tuple[str, Tensor] | None = None
            for name in passed:
                stop = pair[0].advance()
                if stop is None or stop[0] != name:
                    raise _make_path_error(name)
            for name in passed[:-1]:
                if name in self._layers:
                    self._find_output(pair[1], name)
            stops.append(stop)
        return stops

    @staticmethod
    def _find_output(original: _Run, name: str) -> Tensor:
        stop = original.advance()
        if stop is None or stop[0] != name:
            raise _make_path_error(name)
        return stop[1]


def _make_input_hook(name: str):  # type: ignore[no-untyped-def]
    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        run: _Run | None = getattr(_CURRENT, "run", None)
        if run is not None:
            run.pause(name, inputs[0])

    return stop


def _make_output_hook(name: str):  # type: ignore[no-untyped-def]
    def stop(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        run: _Run | None = getattr(_CURRENT, "run", None)
        if run is not None:
            run.pause(name, output)

    return stop


def _make_path_error(name: str | None) -> ConfigError:
    got = f"runs that do not come to the same layers (at {name or 'the end'})"
    return ConfigError.at("the models", got=got, needed="a forward that takes the same way for all images")


def _divide(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """Yield the images of all batches, at most `count` at a time."""
    for batch in batches:
        yield from torch.split(batch, count)
