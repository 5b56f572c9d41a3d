"""Follow the numbers that multiply attention scores, such as `head_dim ** -0.5`, to where they come from.

A product of queries and keys sums over the channels of a head. A number that multiplies it on the way, before or after
the sum, and that is a power of the number of these channels, is a scale: it must follow them. Other numbers stay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.tracing.calls import FunctionCall
from timm_autoslim.tracing.labels import Label
from timm_autoslim.tracing.ops.schema import OperatorCall, tensors_in_lists
from timm_autoslim.utils.tensors import named_tensors

_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "dot"})
# Operators that move what they get: a number that multiplied it before multiplies what they return.
_MOVE_NAMES = """
    _reshape_alias _to_copy _unsafe_view add alias as_strided cat clone constant_pad_nd contiguous copy detach
    expand flip gather index index_select lift_fresh lift_fresh_copy masked_fill native_dropout neg numpy_T
    permute repeat reshape roll select slice split split_with_sizes squeeze stack sub t transpose unbind unfold
    unsafe_split unsafe_split_with_sizes unsqueeze view where
"""
_MOVES = frozenset(_MOVE_NAMES.split())
_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1}
_MAX_HEADS = 256
_TARGETS = (-0.5, -1.0)  # powers of the channels that scales are in all
_TOLERANCE = 1e-6  # relative; that of half precision tensors is their own


class AttributeFloat(float):
    """A floating point attribute of a module with its path. Products, quotients and powers of it keep the path.

    Attributes:
        path: `model.<path>`, whose value is proportional to this number ** (1 / power).
        power: the power of the attribute that this number is proportional to.
    """

    path: str
    power: float

    def __new__(cls, value: float, path: str, power: float = 1) -> AttributeFloat:
        """Return `value` with this path."""
        number = super().__new__(cls, value)
        number.path, number.power = path, power
        return number

    def __mul__(self, other: Any) -> Any:
        return self._keep(super().__mul__(other), other, 1)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._keep(super().__truediv__(other), other, 1)

    def __rtruediv__(self, other: Any) -> Any:
        return self._keep(super().__rtruediv__(other), other, -1)

    def __pow__(self, other: Any, mod: None = None) -> Any:
        return self._keep(super().__pow__(other), other, other)

    def _keep(self, value: Any, other: Any, power: float) -> Any:
        """Return the result of arithmetic with `other`, with this path if that is an ordinary number."""
        if isinstance(value, float) and not isinstance(other, AttributeFloat):
            return AttributeFloat(value, self.path, self.power * power)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return float(self)

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return (float, (float(self),))


def wrap_floats(model: nn.Module) -> None:
    """Give every floating point attribute of every module its path, except of torch's own modules."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.modules."):
            continue
        prefix = f"{path}." if path else ""
        for name, value in list(module.__dict__.items()):
            if isinstance(value, float) and not name.startswith("_"):
                module.__dict__[name] = AttributeFloat(float(value), prefix + name)


@dataclass(frozen=True, eq=False)
class Factor:
    """A number that multiplies something.

    Attributes:
        value: the number; None if it is unknown, as that of a weight; nan if it has no data.
        path: the attribute or tensor that it comes from; None if the code has it from elsewhere.
        power: the power of that attribute.
        tolerance: how exact the value is, relative to it.
    """

    value: float | None
    path: str | None = None
    power: float = 1
    tolerance: float = _TOLERANCE

    def raised(self, power: float, times: float = 1) -> Factor:
        """Return `times` this number to a power."""
        value = None if self.value is None or self.value <= 0 else times * self.value**power
        return Factor(value, self.path, self.power * power, self.tolerance)


@dataclass(eq=False)
class Scores:
    """One matrix product of a run, and the numbers that multiply it.

    Attributes:
        path: the module that computes it.
        index: how many products that module computed before it in this run.
        lengths: the number of rows, and of what it sums over.
        label: the channels that a scale of it follows: those that it sums over, or, between channels, those of its
            rows; None if there are none.
        rows: the channels of its rows, if its columns are channels too.
        across: it is attention between channels.
        factors: the numbers; one stands here twice if it multiplies both sides.
    """

    path: str
    index: int
    lengths: tuple[int, int]
    label: Label = None
    rows: Label = None
    across: bool = False
    factors: list[Factor] = field(default_factory=list)

    def count_channels(self, across: bool) -> int:
        """Return the number of channels that a scale follows."""
        return self.lengths[0 if across else 1]

    def multiply(self) -> float:
        """Return the product of all numbers that are known."""
        return math.prod(factor.value for factor in self.factors if factor.value)

    def find_scale(self) -> dict[Factor, float]:
        """Return the numbers that follow the channels, each with the power of their number that it is."""
        known = [(f, f.value) for f in self.factors if f.value is not None and f.value > 0 and f.value != 1]
        length = self.count_channels(self.across)
        for target in _TARGETS:
            scale = length**target
            matches = {f: target for f, value in known if math.isclose(value, scale, rel_tol=f.tolerance)}
            if matches:
                return matches
            tolerance = sum(factor.tolerance for factor, _ in known)
            if len(known) > 1 and math.isclose(math.prod(value for _, value in known), scale, rel_tol=tolerance):
                powers = {factor: math.log(value, length) for factor, value in known}
                if all(abs(4 * power - round(4 * power)) < 1e-2 for power in powers.values()):
                    return {factor: round(4 * power) / 4 for factor, power in powers.items()}
        return {}

    def find_empty(self) -> Factor | None:
        """Return a number without data, if there is one: it may be a scale."""
        return next((f for f in self.factors if f.value is not None and math.isnan(f.value)), None)

    def find_constants(self) -> list[Factor]:
        """Return the numbers that stay as they are, except of weights, and of 1."""
        scale = self.find_scale()
        return [f for f in self.factors if f not in scale and f.value is not None and f.value != 1]


@dataclass(frozen=True)
class _Load:
    """The numbers that multiplied a tensor on its way, and the scores that it is made of."""

    factors: tuple[Factor, ...] = ()
    scores: tuple[Scores, ...] = ()


_NOTHING = _Load()


class ScaleTracker:
    """Follows numbers through the operators of one run.

    Attributes:
        scores: all matrix products, in the order of execution.
        read: paths of the attributes that reached a function of torch.
        read_constant: returns the value of a tensor of one element that follows from constants of the code alone.
    """

    def __init__(self, tensors: Mapping[int, Factor]) -> None:
        """Prepare a run; `tensors` are those of the model that stand for one number, by their ids."""
        self.scores: list[Scores] = []
        self.read: set[str] = set()
        self.read_constant: Callable[[Tensor], float | None] = lambda tensor: None
        self._tensors = tensors
        self._counts: Counter[str] = Counter()
        # by id of a tensor; it is kept alive, since ids are used again otherwise
        self._loads: dict[int, tuple[Tensor, _Load]] = {}
        self._numbers: dict[int, tuple[Tensor, Factor]] = {}

    def start(self) -> None:
        """Start another run of the same model."""
        self.scores = []
        self._counts.clear()

    def note_call(self, call: FunctionCall) -> None:
        """Note which attributes a function of torch gets."""
        self.read.update(a.path for a in (*call.args, *call.kwargs.values()) if isinstance(a, AttributeFloat))

    def follow(self, op: OperatorCall, path: str, call: FunctionCall | None = None) -> Scores | None:
        """Follow an operator in the module `path`; return its scores if it is a matrix product."""
        name = op.name.removesuffix("_")
        if name in _PRODUCTS:
            return self._follow_product(op, path, call)
        if name in ("mul", "div"):
            self._follow_scaling(op, name == "mul", call)
        elif name in _MOVES:
            self._follow_move(op)
        elif name in _POWERS or name == "pow":
            number = self._read_number(op["self"], None)
            power = op["exponent"] if name == "pow" and isinstance(op["self"], Tensor) else _POWERS.get(name)
            if number is not None and isinstance(power, (int, float)):
                self._numbers[id(op.out)] = op.out, number.raised(power)
        return None

    def _follow_product(self, op: OperatorCall, path: str, call: FunctionCall | None) -> Scores:
        a, b = op.tensors[-2:]  # (N, K), (K, M), with a batch in front of both; vectors are (K,)
        index, self._counts[path] = self._counts[path], self._counts[path] + 1
        scores = Scores(path, index, (a.shape[-2] if a.dim() > 1 else 1, a.shape[-1]))
        scores.factors += [*self._get_load(a).factors, *self._get_load(b).factors]
        alpha = op.get("alpha", 1)
        if alpha != 1:
            scores.factors += filter(None, [self._read_number(alpha, call)])
        others = [s for bias in op.tensors[:-2] for s in self._get_load(bias).scores]
        self._loads[id(op.out)] = op.out, _Load((), (scores, *others))
        self.scores.append(scores)
        return scores

    def _follow_scaling(self, op: OperatorCall, multiplies: bool, call: FunctionCall | None) -> None:
        a, b = op["self"], op["other"]
        number_a, number_b = self._read_number(a, call), self._read_number(b, call)
        load = self._get_load(a)
        if number_a is not None and number_b is not None:
            # a tensor by an ordinary number
            if not isinstance(b, Tensor) and number_a.path and number_b.value is not None:
                number = number_a.raised(1, number_b.value if multiplies else 1 / number_b.value)
                self._numbers[id(op.out)] = op.out, number
                return
            # one of them may be an activation of one element
        elif number_a is not None and isinstance(b, Tensor):
            a, b, number_b, load = b, a, number_a, self._get_load(b) if multiplies else _NOTHING
        if number_b is not None:
            factor = number_b if multiplies else number_b.raised(-1)
            for scores in load.scores:
                scores.factors.append(factor)
            load = _Load((*load.factors, factor), load.scores)
        elif multiplies:
            other = self._get_load(b)
            load = _Load(load.factors + other.factors, load.scores + other.scores)
        if load is not _NOTHING:
            self._loads[id(op.out)] = op.out, load

    def _follow_move(self, op: OperatorCall) -> None:
        tensors = [t for t in op.tensors if t.is_floating_point()]
        if not tensors:
            return
        outputs = tensors_in_lists(op.out)
        loads = [self._get_load(t) for t in tensors]
        common = tuple(f for f in loads[0].factors if all(f in load.factors for load in loads[1:]))
        scores = tuple(dict.fromkeys(s for load in loads for s in load.scores))
        number = self._read_number(tensors[0], None) if len(tensors) == 1 else None
        for out in outputs:
            if common or scores:
                self._loads[id(out)] = out, _Load(common, scores)
            if number is not None and number.path is not None and op.name not in ("add", "sub", "neg"):
                self._numbers[id(out)] = out, number

    def _get_load(self, tensor: Any) -> _Load:
        entry = self._loads.get(id(tensor))
        return entry[1] if entry else _NOTHING

    def _read_number(self, value: Any, call: FunctionCall | None) -> Factor | None:
        """Return the number that an argument is; None if it is a tensor of many."""
        if isinstance(value, Tensor):
            if id(value) in self._numbers:
                return self._numbers[id(value)][1]
            if id(value) in self._tensors or value.numel() != 1:
                return self._tensors.get(id(value))
            exactness = torch.finfo(value.dtype).eps if value.is_floating_point() else 0
            return Factor(self.read_constant(value), tolerance=max(_TOLERANCE, 4 * exactness))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        for number in (*call.args, *call.kwargs.values()) if call else ():
            if isinstance(number, AttributeFloat) and number > 0:
                for power in (1.0, 0.5):  # fused attention multiplies both sides by the root
                    if math.isclose(number**power, value, rel_tol=1e-12):
                        return Factor(float(value), number.path, number.power * power)
        return Factor(float(value))


def find_number_tensors(model: nn.Module) -> dict[str, Factor]:
    """Return the tensors of a model that stand for one number: all of their elements, (), (1,) or (heads, 1, 1), agree.

    The number of a trained parameter is unknown, and that of a tensor without data is nan.
    """
    numbers: dict[str, Factor] = {}
    for name, tensor in named_tensors(model).items():
        if not tensor.is_floating_point() or tensor.numel() > _MAX_HEADS or (tensor.dim() and tensor.shape[-1] != 1):
            continue
        if tensor.is_meta or tensor.requires_grad:
            numbers[name] = Factor(None if isinstance(tensor, nn.Parameter) else math.nan, name)
            continue
        values = set(tensor.detach().double().flatten().tolist())
        value = values.pop() if len(values) == 1 else None
        numbers[name] = Factor(value, name, tolerance=max(_TOLERANCE, 4 * torch.finfo(tensor.dtype).eps))
    return numbers
