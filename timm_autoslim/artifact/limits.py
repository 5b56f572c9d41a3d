"""What a stranger's folder may make us hold in memory: data of a bounded size, and a bounded number of elements."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from timm_autoslim.artifact.bases import create_raw
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import is_int

# Far above what timm's and torchvision's constructors are called with, far below what exhausts memory by itself.
MAX_ARG = 1_000_000
MAX_ITEMS = 1_000
MAX_DEPTH = 8
# Elements that building a base may allocate: 2 GiB at float32, unless the base needs more without any arguments.
MAX_ELEMENTS = 2**29
# Where the file of the weights is known, its elements bound the base further: an eighth of all widths is a sixty-fourth
# of the weights.
FILE_RATIO = 64
MIN_ELEMENTS = 2**26
# Tensors that building a base may create, several times what the deepest of timm's models do.
MAX_TENSORS = 20_000
# Results up to this many elements are counted once they are there; larger ones are foretold on the meta device.
SMALL = 2**22
ENDLESS = 2**62  # more than any limit
# Functions that constructors call all the time and that return no new tensor.
QUIET = frozenset(
    ("__get__", "__set__", "__bool__", "_set_grad_enabled", "device", "dim", "is_contiguous", "item", "numel", "size")
)
# Functions that fill a tensor with random numbers, and those that only shift what another has filled.
RANDOM = frozenset(("kaiming_uniform_", "normal_", "uniform_"))
SHIFTS = frozenset(("add_", "clamp_", "erfinv_", "mul_"))


def fail(where: str, got: object, needed: str) -> ArtifactError:
    """Return the error of a recipe's part."""
    where = where if len(where) <= 200 else f"{where[:200]}..."
    return ArtifactError(
        f"recipe {where!r}: got {reprlib.repr(got)}, needed {needed}; "
        "export the model again, with the base= and base_args= that it was created with"
    )


def check_plain(where: str, value: object, depth: int = MAX_DEPTH) -> None:
    """Accept nothing but JSON-like data of a bounded size.

    Raises:
        ArtifactError: other types, numbers above `MAX_ARG`, more items or levels.
    """
    if depth and isinstance(value, Mapping | list | tuple) and len(value) <= MAX_ITEMS:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if not isinstance(key, str | int) or (isinstance(key, str) and len(key) > MAX_ITEMS):
                raise fail(where, key, f"a text key of at most {MAX_ITEMS} letters")
            check_plain(f"{where}.{key}", item, depth - 1)
    elif isinstance(value, int | float):
        if not abs(value) <= MAX_ARG:
            raise fail(where, value, f"a number of at most {MAX_ARG}")
    elif not (value is None or (isinstance(value, str) and len(value) <= MAX_ITEMS)):
        raise fail(where, value, f"plain data of at most {MAX_ITEMS} items and {MAX_DEPTH} levels")


def copy_plain(where: str, value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a copy of containers in containers, of a bounded number of levels.

    Raises:
        ArtifactError: more levels, which would end the stack of whatever copies or compares them.
    """
    if isinstance(value, Mapping | list | tuple) and not depth:
        raise fail(where, value, f"data of at most {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return {key: copy_plain(where, item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (i if i is None or type(i) is int else copy_plain(where, i, depth - 1) for i in value)
        return tuple(items) if isinstance(value, tuple) else list(items)
    return value


# ------------------------------------------------------------------------------------------------ memory


class Bounded(TorchFunctionMode):
    """Refuse to create tensors beyond a number of elements, before memory is taken for a large one that exceeds it.

    It stands above torch's functions, not in its dispatcher, where it would double the time of small constructors.

    Args:
        limit: the number of elements.
        unfilled: leave parameters as memory was found where they would be filled with random numbers.
    """

    def __init__(self, limit: int, unfilled: bool = False) -> None:
        super().__init__()
        self.left = limit
        self.tensors = 0
        self.unfilled: WeakValueDictionary[int, nn.Parameter] | None = WeakValueDictionary() if unfilled else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _returns_no_tensor(func):
            target = None if self.unfilled is None else args[0] if args else kwargs.get("tensor")
            if type(target) is nn.Parameter and self._leaves(target, func.__name__):
                return target
            return func(*args, **kwargs)
        size, given = _at_most([*args, *kwargs.values()])
        if size > SMALL:
            self._refuse_beyond(_foretold(func, args, kwargs, size))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self.tensors += not given
            if out.dtype != torch.bool or not given:  # masks do not last
                self.left -= out.numel()
        elif isinstance(out, list | tuple):
            self.left -= sum(item.numel() for item in out if isinstance(item, Tensor))
        if self.tensors > MAX_TENSORS or self.left < 0:
            self._refuse_beyond(math.inf)
        return out

    def _leaves(self, target: nn.Parameter, name: str) -> bool:
        """Whether a function in place is left out; then so is what shifts the numbers that it would have drawn."""
        assert self.unfilled is not None
        if name in RANDOM:
            self.unfilled[id(target)] = target
            return True
        return name in SHIFTS and id(target) in self.unfilled

    def _refuse_beyond(self, elements: float) -> None:
        if elements > self.left:
            self.left = -1
            raise MemoryError("too many elements for a base of this name")


@lru_cache(1024)
def _returns_no_tensor(func: Any) -> bool:
    """Whether a function returns no new tensor: it is among the quiet ones, or works in place."""
    name = getattr(func, "__name__", "")
    return name in QUIET or (name[-1:] == "_" and name[-2:] != "__" and not name.startswith("resize"))


def _at_most(waiting: list[Any]) -> tuple[int, bool]:
    """How many elements a function of these arguments can return at most, and whether a tensor is among them."""
    size, given = 1, False
    for value in waiting:  # grows while it is read
        factor = 1
        if type(value) is int:  # by far the most
            factor = abs(value)
        elif isinstance(value, Tensor):
            factor, given = value.numel(), True
        elif is_int(value):
            factor = abs(value)
        elif isinstance(value, float):
            factor = math.ceil(abs(value)) if math.isfinite(value) else 1
        elif isinstance(value, list | tuple):
            waiting += value
        if size < ENDLESS:  # a product of all the numbers of a long list would take minutes
            size *= factor or 1
    return size, given


def _foretold(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], at_most: int) -> int:
    """How many elements a function will return: found on the meta device, where they cost nothing."""

    def hollow(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    try:
        args, kwargs = tree_map_only(Tensor, hollow, (args, {k: v for k, v in kwargs.items() if k != "device"}))
        with torch.device("meta"):
            out = func(*args, **kwargs)
    except Exception:  # it reads data, or is no function of tensors at all
        return at_most
    return sum(tensor.numel() for tensor in _tensors(out))


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, list | tuple):
        for item in out:
            yield from _tensors(item)


def bounded_unfilled(base: str, file_elements: int, function: Any, /, *args: Any, **kwargs: Any) -> nn.Module:
    """As `bounded`, of a function that returns a model whose whole state dict will be loaded from a file at once.

    Parameters are not filled with random numbers, which takes most of the time of a large model's constructor. Where
    that fails, or a parameter is not of the state dict, the model is built again as usual.
    """
    guard = Bounded(_limit(file_elements), unfilled=True)
    try:
        with guard:
            model: nn.Module = function(*args, **kwargs)
    except Exception:  # too many elements, or a constructor that makes something of the random numbers
        pass  # so it is built as usual below, and what is wrong is said there
    else:
        if {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}.issuperset(guard.unfilled or ()):
            return model
    rebuilt: nn.Module = bounded(base, file_elements, function, *args, **kwargs)
    return rebuilt


def _limit(file_elements: int | None) -> int:
    """How many elements a base may have beside weights of so many; None if there are none."""
    return MAX_ELEMENTS if file_elements is None else min(MAX_ELEMENTS, _fitting(file_elements))


def _fitting(file_elements: int) -> int:
    """How many elements a base may have that weights of so many can be slices of."""
    return max(FILE_RATIO * file_elements, MIN_ELEMENTS)


def bounded(base: str, file_elements: int | None, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call what builds a part of a base; arguments may make it large only as far as the plain base is large.

    Args:
        base: its name.
        file_elements: elements of the weights that it is to be filled with after slimming, None if there are none.
            They bound the base, whatever its name.
        function, *args, **kwargs: what is called.

    Raises:
        ArtifactError: more elements were asked for. None were allocated for the tensor that exceeds the limit.
    """
    limit = _limit(file_elements)
    guard = Bounded(limit)
    try:
        with guard:
            return function(*args, **kwargs)
    except Exception as error:
        if guard.left >= 0:
            raise
        usual = 4 * _usual(base) if limit == MAX_ELEMENTS else 0
        granted = usual if file_elements is None else min(usual, _fitting(file_elements))
        if granted <= limit:
            beside = "" if file_elements is None else f" beside weights of {file_elements:,}"
            needed = f"arguments that build at most {limit:,} numbers{beside} in {MAX_TENSORS:,} tensors"
            raise fail("base_args", kwargs or args, needed) from error
    with Bounded(granted):
        return function(*args, **kwargs)


def _usual(base: str) -> int:
    """How many elements a base creates without arguments; 0 if it needs some, or cannot be built without data."""
    meter = Bounded(ENDLESS)
    try:
        with torch.device("meta"), meter:
            create_raw(base)
    except ArtifactError:
        return 0
    return ENDLESS - meter.left
