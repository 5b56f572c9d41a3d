"""What one forward of a subnet does, as functions of the widths: its operators, and how long its tensors live.

A tape is recorded on the meta device from a few subnets of the same model: the same operators run in all of them, and
every number that differs (lengths of tensors, sizes among the arguments) is found again among the active lengths that
the channel graph knows. Reading it at any widths is then a few array operations.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_autoslim.costs.formulas import Solver
from timm_autoslim.errors import TraceError
from timm_autoslim.slicing.slices import apply_slices, clear_caches
from timm_autoslim.tracing import ops
from timm_autoslim.tracing.formulas import Numbers, Row, Terms
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.ops import recurrent
from timm_autoslim.utils.meta import copy_to_meta, fix_seed, make_meta_example, run_model
from timm_autoslim.utils.tensors import collect_tensors, named_tensors

RUNS = 4  # subnets beside the widest that a tape is recorded from; one more for every time two lengths look alike
MAX_RUNS = 10
ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor among the arguments of an operator: its type, its shape, and its dimensions from slow to fast."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """One operator: its name (`aten.mm.default`), its module, its arguments with a `TensorSpec` for every tensor."""

    name: str
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Storage:
    """Memory that one operator allocates: how many bytes, in which operator, and the last one that it lives in."""

    numbers: tuple[int, ...]  # the bytes of one element, and the lengths of its tensor
    born: int
    last: int
    unless_equal: tuple[int, int] | None = None  # it is not there where these two numbers agree


class _Recorder(TorchDispatchMode):
    """Note every operator and every storage of a run; a storage ends when Python lets go of its last tensor."""

    def __init__(self, plain: nn.Module, example: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.storages: list[Storage] = []
        self.scope: list[str] = [""]
        self.whole = 0  # inside a function that is taken as one operator
        given = [*named_tensors(plain).values(), *collect_tensors(example)]
        self._known = {_key(t): -1 for t in given}
        self._kept = given
        self._hooks = [m.register_forward_pre_hook(partial(self._enter, path)) for path, m in plain.named_modules()]
        self._hooks += [m.register_forward_hook(self._leave, always_call=True) for m in plain.modules()]

    def _enter(self, path: str, *_: Any) -> None:
        self.scope.append(path)

    def _leave(self, *_: Any) -> None:
        self.scope.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = ops.execute(func, args, kwargs)
        if not self.whole:
            self.note(str(func), args, kwargs, out)
        return out

    def note(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Note one operator and what it allocated."""
        at = len(self.operators)
        self.operators.append(Operator(name, self.scope[-1], _described(tuple(args)), _described(kwargs)))
        for tensor in collect_tensors(out):
            key = _key(tensor)
            if key in self._known:
                continue
            storage = tensor.untyped_storage()
            self._known[key] = len(self.storages)
            size = tensor.element_size()
            exact = storage.nbytes() == tensor.numel() * size
            numbers = (size, *tensor.shape) if exact else (1, storage.nbytes())
            self.storages.append(Storage(numbers, at, -1))
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        index = self._known.pop(key, -1)
        if index >= 0:
            self.storages[index].last = len(self.operators) - 1

    def close(self) -> None:
        """Leave the model, and let what is still alive live to the end."""
        for hook in self._hooks:
            hook.remove()
        for storage in self.storages:
            storage.last = len(self.operators) - 1 if storage.last < 0 else storage.last


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _described(value: Any) -> Any:
    """Return arguments with a `TensorSpec` in place of every tensor."""
    if isinstance(value, Tensor):
        shape, strides = tuple(value.shape), value.stride()
        order = sorted(range(len(shape)), key=lambda d: (-strides[d] if shape[d] > 1 else 0, d))
        return TensorSpec(value.dtype, shape, tuple(order) if _moved(shape, order) else tuple(range(len(shape))))
    if isinstance(value, (tuple, list)):
        return tuple(_described(v) for v in value)
    if isinstance(value, dict):
        return {key: _described(v) for key, v in value.items()}
    return value


def _moved(shape: tuple[int, ...], order: Sequence[int]) -> bool:
    """Whether the order differs in dimensions that are longer than 1."""
    long = [d for d in order if shape[d] > 1]
    return long != sorted(long)


class _Whole(TorchFunctionMode):
    """Take fused attention and recurrent layers as one operator each, as their kernels are."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        make: Callable[[], Tensor | tuple[Tensor, ...]]
        if name == ATTENTION and all(t.dim() == 4 for t in args[:3]) and len(args) >= 3:
            make = partial(_attended, *args[:3])
        elif name in recurrent.LAYERS:
            make = partial(recurrent.outputs, args, kwargs)
        else:
            return func(*args, **kwargs)
        self.recorder.whole += 1
        try:
            out = make()
        finally:
            self.recorder.whole -= 1
        self.recorder.note(name, args, kwargs, out)
        if name == ATTENTION:
            self._scores(args[0], args[1], collect_tensors(out)[0])
        return out

    def _scores(self, q: Tensor, k: Tensor, out: Tensor) -> None:
        """Where queries and values differ in width, torch's fused kernels do not serve, and it makes the scores.

        In the softmax it then holds scaled queries and keys, the scores, and their softmax; the result is yet to come
        (`_scaled_dot_product_attention_math` of ATen).
        """
        at, size = len(self.recorder.operators) - 1, q.element_size()
        scores = (*q.shape[:3], k.shape[2])
        unless = (q.shape[-1], out.shape[-1])
        for numbers in ((size, *q.shape), (size, *k.shape), (2 * size, *scores), (-size, *out.shape)):
            self.recorder.storages.append(Storage(tuple(int(n) for n in numbers), at, at, unless))


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the result of fused attention, heads next to channels in memory, as its kernels write it."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


# -- arguments as numbers -------------------------------------------------------------------------------------------


def _numbers(value: Any) -> Iterator[int]:
    """Yield every integer in described arguments, in their order."""
    if isinstance(value, TensorSpec):
        yield from value.shape
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield int(value)


def _filled(value: Any, numbers: Iterator[int]) -> Any:
    """Return described arguments with these integers in place of their own."""
    if isinstance(value, TensorSpec):
        return TensorSpec(value.dtype, tuple(next(numbers) for _ in value.shape), value.order)
    if isinstance(value, (tuple, list)):
        return tuple(_filled(part, numbers) for part in value)
    if isinstance(value, dict):
        return {key: _filled(part, numbers) for key, part in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return next(numbers)
    return value


# -- the tape -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one forward of one subnet did."""

    operators: list[Operator]
    storages: list[Storage]

    def peak(self) -> int:
        """Return the most bytes that its storages took at once."""
        sizes = [prod(s.numbers) * (s.unless_equal is None or len(set(s.unless_equal)) > 1) for s in self.storages]
        return _most(self.storages, len(self.operators), np.array(sizes, np.int64))

    def form(self) -> tuple[Any, ...]:
        """Return what must be the same in all runs."""
        return (
            [(o.name, sum(1 for _ in _numbers((o.args, o.kwargs)))) for o in self.operators],
            [(len(s.numbers), s.born, s.last) for s in self.storages],
        )

    def numbers(self) -> tuple[list[int], list[int]]:
        """Return every number of the operators, and of the storages."""
        return (
            [n for o in self.operators for n in _numbers((o.args, o.kwargs))],
            [n for s in self.storages for n in (*s.numbers, *(s.unless_equal or ()))],
        )


def _most(storages: Sequence[Storage], operators: int, sizes: Numbers) -> int:
    """Return the most that storages of these sizes take at once."""
    change: Numbers = np.zeros(operators + 1, np.int64)
    np.add.at(change, [s.born for s in storages], sizes)
    np.subtract.at(change, [s.last + 1 for s in storages], sizes)
    return int(np.cumsum(change).max(initial=0))


class Tape:
    """One forward in eval mode at one batch size and type, as functions of the widths.

    Attributes:
        operators: what ran, in its order, with the arguments of the widest.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        graph: ChannelGraph,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.graph = graph
        plain = copy_to_meta(model).eval()
        example = make_meta_example(example, batch_size)
        if dtype is not None:
            plain = plain.to(dtype)
            example = _cast(example, dtype)
        self._inputs = sum(t.untyped_storage().nbytes() for t in collect_tensors(example))
        runs = _runs(plain, example, graph)
        self._weights = graph.size_terms(_weights(plain))  # after the runs: some modules keep tensors then
        self.operators = runs[0][1].operators
        solver = Solver(graph, [widths for widths, _ in runs])
        columns = [run.numbers() for _, run in runs]
        numbers = self._solved(solver, list(zip(*(c[0] for c in columns), strict=True)))
        sizes = self._solved(solver, list(zip(*(c[1] for c in columns), strict=True)))
        groups = len(graph.group_sizes)
        self._terms = Terms(solver.lengths, groups, numbers)
        self._storages = runs[0][1].storages
        self._sizes = self._storage_terms(solver, groups, sizes)

    def _solved(self, solver: Solver, numbers: Sequence[tuple[int, ...]]) -> list[Row]:
        found = []
        for values in numbers:
            row = solver.solve(values)
            if row is None:
                raise TraceError(
                    f"the model: a length that is {values} at the widths tried is no product or sum of channel counts, "
                    "so peak_bytes and latency_ms are not known"
                )
            found.append(row)
        return found

    def _storage_terms(self, solver: Solver, groups: int, rows: Sequence[Row]) -> Terms:
        products, at = [], 0
        self._conditions: list[tuple[int, Terms]] = []
        for i, storage in enumerate(self._storages):
            parts = rows[at : at + len(storage.numbers)]
            at += len(storage.numbers)
            products.append((prod(s for s, _, _ in parts), prod(d for _, d, _ in parts),
                             tuple(k for _, _, f in parts for k in f)))  # fmt: skip
            if storage.unless_equal is not None:
                self._conditions.append((i, Terms(solver.lengths, groups, rows[at : at + 2])))
                at += 2
        return Terms(solver.lengths, groups, products)

    def peak_bytes(self, widths: Sequence[int]) -> int:
        """Return the bytes of weights and inputs, and the most that all other tensors take at once."""
        sizes = self._sizes(widths)
        for i, terms in self._conditions:
            queries, values = terms(widths)
            sizes[i] *= queries != values
        return self.held_bytes(widths) + _most(self._storages, len(self.operators), sizes)

    def held_bytes(self, widths: Sequence[int]) -> int:
        """Return the bytes of weights and inputs, which are there all the time."""
        return int(self._weights(widths).sum()) + self._inputs

    def operators_at(self, widths: Sequence[int]) -> list[Operator]:
        """Return the operators with the arguments that they have at these widths."""
        numbers = iter(self._terms(widths).tolist())
        found = []
        for o in self.operators:
            args, kwargs = _filled((o.args, o.kwargs), numbers)
            found.append(Operator(o.name, o.path, args, kwargs))
        return found


def _weights(plain: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return for every parameter and buffer the bytes of an element, and its shape."""
    return {name: (t.element_size(), *t.shape) for name, t in named_tensors(plain).items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return an example with its floating point tensors in this type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {key: _cast(v, dtype) for key, v in value.items()}
    return value


def _runs(plain: nn.Module, example: Any, graph: ChannelGraph) -> list[tuple[list[int], Run]]:
    """Run the widest and as many random subnets as tell all lengths apart; return widths and runs.

    Raises:
        TraceError: subnets run other operators than the widest.
    """
    rng = np.random.default_rng(0)
    sizes = list(graph.group_sizes)
    _run(plain, example, graph, sizes)  # some modules keep what they make in their first run
    runs = [(sizes, _run(plain, example, graph, sizes))]
    form = runs[0][1].form()
    while len(runs) <= MAX_RUNS:
        lows = [max(low, n // 2, min(n - 1, 2)) for low, n in zip(graph.floors, sizes, strict=True)]  # 1 is no length
        widths = [int(rng.integers(low, n + 1)) for low, n in zip(lows, sizes, strict=True)]
        runs.append((widths, _run(plain, example, graph, widths)))
        if runs[-1][1].form() != form:
            raise TraceError(
                "the model: narrower subnets run other operators than the widest, so peak_bytes and latency_ms are not "
                "known"
            )
        if len(runs) > RUNS and not Solver(graph, [w for w, _ in runs]).ambiguous():
            break
    return runs


def record(model: nn.Module, example: Any, graph: ChannelGraph, widths: Sequence[int]) -> Run:
    """Return what one forward of the subnet of these widths does, on inputs as the example's."""
    plain = copy_to_meta(model).eval()
    _run(plain, example, graph, graph.group_sizes)  # some modules keep what they make in their first run
    return _run(plain, example, graph, widths)


def _run(plain: nn.Module, example: Any, graph: ChannelGraph, widths: Sequence[int]) -> Run:
    clear_caches(plain.modules())  # each run makes anew what modules cache, as the first one does
    with apply_slices(plain, graph.slices(widths)):
        recorder = _Recorder(plain, example)
        with torch.no_grad(), fix_seed(), _Whole(recorder), recorder:
            out = run_model(plain, example)
        recorder.close()
    del out
    return Run(recorder.operators, recorder.storages)
