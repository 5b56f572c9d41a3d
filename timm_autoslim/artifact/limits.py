"""Limits of the memory that building a base may take, whatever a stranger's folder asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from timm_autoslim.artifact.bases import construct_base
from timm_autoslim.artifact.spec import make_spec_error
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import is_int

# Elements that building a base may allocate: 2 GiB at float32, unless the base needs more without any arguments.
MAX_ELEMENTS = 2**29
# Where the file of the weights is at hand, its elements limit the base further: a model of an eighth of all widths has
# a sixty-fourth of the weights.
FILE_RATIO = 64
MIN_ELEMENTS = 2**26
# Tensors that building a base may create, several times what the deepest of timm's models do.
MAX_TENSORS = 20_000
# Results up to this many elements are counted after they were made; larger ones are computed on the meta device first.
SMALL = 2**22
ENDLESS = 2**62  # more than any limit
# Functions that constructors call all the time and that return no new tensor.
_QUIET = frozenset(
    ("__get__", "__set__", "__bool__", "_set_grad_enabled", "device", "dim", "is_contiguous", "item", "numel", "size")
)
# Functions that fill a tensor with random numbers, and those that only scale and shift what is in a tensor.
_RANDOM = frozenset(("kaiming_uniform_", "normal_", "uniform_"))
_SHIFTS = frozenset(("add_", "clamp_", "erfinv_", "mul_"))


@dataclass(frozen=True)
class MemoryLimit:
    """How many elements may be allocated while a base or a part of it is built.

    Attributes:
        base: the base's name. Arguments may make it large only as far as it is large without any.
        file_elements: elements of the weights that it is to be filled with after slimming, None if there are none.
            They limit the base, whatever its name.
    """

    base: str
    file_elements: int | None = None

    def call(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function that builds a part of the base, and return what it returns.

        Raises:
            ArtifactError: more elements were asked for. None were allocated for the tensor that exceeds the limit.
        """
        limit = self._elements
        guard = AllocationGuard(limit)
        try:
            with guard:
                return function(*args, **kwargs)
        except Exception as error:
            if guard.left >= 0:
                raise
            larger = self._elements_of_large_bases if limit == MAX_ELEMENTS else 0
            if larger <= limit:
                beside = "" if self.file_elements is None else f" beside weights of {self.file_elements:,}"
                needed = f"arguments that build at most {limit:,} numbers{beside} in {MAX_TENSORS:,} tensors"
                raise make_spec_error("base_args", kwargs or args, needed) from error
        with AllocationGuard(larger):
            return function(*args, **kwargs)

    def call_unfilled(self, function: Any, /, *args: Any, **kwargs: Any) -> nn.Module:
        """As `call`, of a function that returns a model whose whole state dict will be loaded from a file at once.

        Parameters are not filled with random numbers, which takes most of the time of a large model's constructor.
        Where that fails, or a parameter is not of the state dict, the model is built again as usual.
        """
        guard = AllocationGuard(self._elements, unfilled=True)
        try:
            with guard:
                model: nn.Module = function(*args, **kwargs)
        except Exception:  # too many elements, or a constructor that computes with the random numbers
            pass  # so it is built as usual below, and what is wrong is raised there
        else:
            if {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}.issuperset(guard.unfilled or ()):
                return model
        model = self.call(function, *args, **kwargs)
        return model

    @property
    def _elements(self) -> int:
        return min(MAX_ELEMENTS, self._elements_by_file)

    @property
    def _elements_by_file(self) -> int:
        """How many elements a base may have that the weights in the file can be slices of."""
        return ENDLESS if self.file_elements is None else max(FILE_RATIO * self.file_elements, MIN_ELEMENTS)

    @property
    def _elements_of_large_bases(self) -> int:
        """The limit of a base that is large without arguments."""
        return min(4 * _count_without_arguments(self.base), self._elements_by_file)


def _count_without_arguments(base: str) -> int:
    """How many elements a base creates without arguments; 0 if it needs some, or cannot be built without data."""
    meter = AllocationGuard(ENDLESS)
    try:
        with torch.device("meta"), meter:
            construct_base(base)
    except ArtifactError:
        return 0
    return ENDLESS - meter.left


# ------------------------------------------------------------------------------------------------ counting


class AllocationGuard(TorchFunctionMode):
    """Refuse to create tensors beyond a number of elements, before memory is taken for a large one that exceeds it.

    It intercepts torch's functions, not its dispatcher, where it would double the time of small constructors.

    Args:
        limit: the number of elements.
        unfilled: leave parameters uninitialized where they would be filled with random numbers.
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
            if type(target) is nn.Parameter and self._skips(target, func.__name__):
                return target
            return func(*args, **kwargs)
        size, from_tensor = _bound_elements([*args, *kwargs.values()])
        if size > SMALL:
            self._refuse_beyond(_count_on_meta(func, args, kwargs, size))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self.tensors += not from_tensor
            if out.dtype != torch.bool or not from_tensor:  # masks do not last
                self.left -= out.numel()
        elif isinstance(out, list | tuple):
            self.left -= sum(item.numel() for item in out if isinstance(item, Tensor))
        if self.tensors > MAX_TENSORS or self.left < 0:
            self._refuse_beyond(math.inf)
        return out

    def _skips(self, target: nn.Parameter, name: str) -> bool:
        """Whether a function in place is skipped, as is then what shifts the numbers that it would have drawn."""
        assert self.unfilled is not None
        if name in _RANDOM:
            self.unfilled[id(target)] = target
            return True
        return name in _SHIFTS and id(target) in self.unfilled

    def _refuse_beyond(self, elements: float) -> None:
        if elements > self.left:
            self.left = -1
            raise MemoryError("too many elements for a base of this name")


@lru_cache(1024)
def _returns_no_tensor(func: Any) -> bool:
    """Whether a function returns no new tensor: it is among the quiet ones, or works in place."""
    name = getattr(func, "__name__", "")
    return name in _QUIET or (name[-1:] == "_" and name[-2:] != "__" and not name.startswith("resize"))


def _bound_elements(values: list[Any]) -> tuple[int, bool]:
    """How many elements a function of these arguments can return at most, and whether one of them is a tensor."""
    size, has_tensor = 1, False
    for value in values:  # grows while it is read
        factor = 1
        if type(value) is int:  # by far the most
            factor = abs(value)
        elif isinstance(value, Tensor):
            factor, has_tensor = value.numel(), True
        elif is_int(value):
            factor = abs(value)
        elif isinstance(value, float):
            factor = math.ceil(abs(value)) if math.isfinite(value) else 1
        elif isinstance(value, list | tuple):
            values += value
        if size < ENDLESS:  # a product of all the numbers of a long list would take minutes
            size *= factor or 1
    return size, has_tensor


def _count_on_meta(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], at_most: int) -> int:
    """How many elements a function will return: computed on the meta device, where they take no memory."""

    def meta_copy(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    try:
        args, kwargs = tree_map_only(Tensor, meta_copy, (args, {k: v for k, v in kwargs.items() if k != "device"}))
        with torch.device("meta"):
            out = func(*args, **kwargs)
    except Exception:  # it reads data, or is no function of tensors at all
        return at_most
    return sum(tensor.numel() for tensor in _list_tensors(out))


def _list_tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, list | tuple):
        for item in out:
            yield from _list_tensors(item)
