"""Run two models on many batches side by side, and stop all runs at the same layer."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.errors import ConfigError
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices
from timm_autoslim.utils.batches import divide_batch
from timm_autoslim.utils.meta import count_images, run_model
from timm_autoslim.utils.tensors import collect_tensors

# What is alive besides the inputs and outputs of one layer: residual sums and other branches.
_ALIVE = 3
_LARGEST_BATCH = 64


class _Cancelled(BaseException):
    """Ends a run that is not wanted any more."""


class _Run:
    """One forward, in a thread of its own, that stops whenever it reaches a module that stops it.

    It runs a replica of the model, which shares its weights: what the forward keeps in modules meets no other run, and
    the model itself gets no hook.
    """

    def __init__(self, model: nn.Module, batch: Any, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Prepare a run.

        Args:
            model: the model, in evaluation mode.
            batch: inputs of the model.
            inputs: paths of modules at which it stops with what enters them.
            outputs: paths of modules at which it stops with what leaves them.
        """
        self.replica = replicate(model, Slices({}, {}))
        for name in inputs:
            module = self.replica.get_submodule(name)
            module.register_forward_pre_hook(functools.partial(self._stop_before, name), with_kwargs=True)
        for name in outputs:
            self.replica.get_submodule(name).register_forward_hook(functools.partial(self._stop_after, name))
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._stop: tuple[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._work, args=(batch,), daemon=True)

    def start(self) -> None:
        """Start the thread, which waits for `advance`."""
        self._thread.start()

    def _work(self, batch: Any) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                with torch.no_grad():
                    run_model(self.replica, batch)
        except _Cancelled:
            pass
        except BaseException as error:  # raised in the thread that waits
            self._error = error
        self._stop = None
        self._stopped.release()

    def _stop_before(self, name: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._pause(name, collect_tensors((inputs, named))[0])

    def _stop_after(self, name: str, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        self._pause(name, output)

    def _pause(self, name: str, tensor: Tensor) -> None:
        self._stop = name, tensor
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def advance(self) -> tuple[str, Tensor] | None:
        """Run to the next stop; return the module's path and the tensor there, or None at the end.

        An exception of the run is raised here again.
        """
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._stop

    def cancel(self) -> None:
        """End the run where it stands."""
        self._cancelled = True
        self._go.release()

    def join(self) -> None:
        """Wait until a run that was cancelled has come to its end."""
        if self._thread.ident is not None:
            self._thread.join()


class Lockstep:
    """All runs of a slim model and of its original, stopped layer by layer.

    As a context it ends all runs. As an iterator it yields the path of every stop, in the order of the forward, with
    two lists of a tensor for each batch: what enters there in the slim model, and, of the original, what comes out of
    a layer or enters a BatchNorm.

    Attributes:
        images: how many images run; more join as layers become smaller.
    """

    def __init__(
        self, slim: nn.Module, original: nn.Module, layers: Sequence[str], norms: Sequence[str], sizes: Sequence[int],
        batches: Iterator[Any], memory: int, divides: bool = True,
    ) -> None:  # fmt: skip
        """Take the models, and where they stop.

        Args:
            slim, original: the models; the slim model is in evaluation mode.
            layers: paths of modules, of which the original's outputs are yielded.
            norms: paths of modules, of which its inputs are yielded.
            sizes: by stop, the bytes of one image that its layer and all later ones have at most.
            batches: inputs of the models.
            memory: how many bytes activations may take.
            divides: whether batches may be divided; else each counts as one image.
        """
        self._slim, self._layers, self._norms = slim, layers, norms
        self._original = replicate(original, Slices({}, {})).eval()
        self._capacities = [max(1, memory // (2 * _ALIVE * size)) for size in sizes]  # in images
        largest = min([_LARGEST_BATCH, *(capacity // 4 for capacity in self._capacities[:1])])
        self._batches, self._divides = _divide(batches, max(1, largest)) if divides else batches, divides
        self._runs: list[tuple[_Run, _Run]] = []
        self.images = 0

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        runs = [run for pair in self._runs for run in pair]
        for run in runs:  # all of them before any is waited for, which can be interrupted
            run.cancel()
        for run in runs:
            run.join()

    def list_modules(self, name: str) -> list[nn.Module]:
        """Return a module of the slim model as it is in the model and in all of its runs."""
        return [self._slim.get_submodule(name), *(slim.replica.get_submodule(name) for slim, _ in self._runs)]

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
            outputs = [_advance_to(original, name)[1] for _, original in self._runs]
            yield name, [stop[1] for stop in stops if stop], outputs

    def _admit(self, passed: list[str]) -> list[tuple[str, Tensor] | None]:
        """Start runs of further batches as long as they fit, and let them come to where the others stand."""
        capacity = self._capacities[max(0, len(passed) - 1)] if self._capacities else 1
        stops: list[tuple[str, Tensor] | None] = []
        while self.images < capacity and (batch := next(self._batches, None)) is not None:
            slim = _Run(self._slim, batch, (*self._layers, *self._norms), ())
            original = _Run(self._original, batch, self._norms, self._layers)
            self._runs.append((slim, original))
            slim.start()
            original.start()
            self.images += count_images(batch) if self._divides else 1
            stop: tuple[str, Tensor] | None = None
            for name in passed:
                stop = _advance_to(slim, name)
            for name in passed[:-1]:
                _advance_to(original, name)
            stops.append(stop)
        return stops


def _advance_to(run: _Run, name: str) -> tuple[str, Tensor]:
    stop = run.advance()
    if stop is None or stop[0] != name:
        raise _make_path_error(name)
    return stop


def _make_path_error(name: str | None) -> ConfigError:
    got = f"runs that do not come to the same layers (at {name or 'the end'})"
    return ConfigError.at("the models", got=got, needed="a forward that takes the same way for all images")


def _divide(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield the images of all batches, `count` at a time as far as they are tensors of one shape; less at the end."""
    waiting: list[Tensor] = []
    for part in (part for batch in batches for part in divide_batch(batch, count)):
        if not isinstance(part, Tensor):
            yield part
            continue
        if waiting and (part.shape[1:] != waiting[0].shape[1:] or sum(map(len, waiting)) + len(part) > count):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield torch.cat(waiting)
