"""The spec of a slim model: how it differs from its base, as a frozen value that is parsed from JSON data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import reprlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from timm_autoslim.artifact.outline import Outline
from timm_autoslim.errors import ArtifactError
from timm_autoslim.slicing.slices import Slices, compose_runs
from timm_autoslim.utils.arguments import is_int

FORMAT = 1
ARCHITECTURE = "autoslim"  # the name of slim models in timm's registry
TORCHVISION = "torchvision/"  # what the name of a torchvision base begins with

# Limits of JSON data: far above what timm's and torchvision's constructors are called with, far below what exhausts
# memory by itself.
MAX_NUMBER = 1_000_000
MAX_ITEMS = 1_000
MAX_DEPTH = 8
# A spec may come from a stranger: it may say how the base is built, never where weights or settings come from.
FORBIDDEN_ARGS = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path"),
        *("cache_dir", "weights", "progress", "spec", "device", "dtype"),
        *("features_only", "out_indices", "feature_cls", "feature_cfg"),
    )
)
# What timm's models have, and torchvision's get from the loader, which measures them.
_TIMM_ONLY = ("feature_info", "num_features", "head_hidden_size")

Size = int | tuple[tuple[int, int], ...] | None
AttributeValue = int | float | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a slim model differs from its base. Checked as far as that goes without the base, and immutable throughout.

    Attributes:
        base: the name that creates the base (`resnet50`, `torchvision/resnet18`), None if it is not known.
        base_args: the arguments of its constructor; `copy_arguments()` returns them as the constructor takes them.
        sizes: by name of a tensor, what is left of each of its axes: None for all channels, an integer for the first
            channels, runs of (start, length) for others.
        attributes: by path (`layer1.0.conv1.groups`), the value of a module's attribute.
        widths: by name of a channel group, its width, for readers; loading does not need them.
        format: the version of this format.
        outline: the model that has the spec, as it was when it got it, so that `save` notices changes; None if nobody
            drew it. It is no part of the spec's value, nor of its JSON data.

    Example:
        >>> spec = Spec(base="resnet10t", sizes={"fc.weight": [None, 48]}, widths={"layer4.0.conv2": 48})
        >>> spec.sizes["fc.weight"]
        (None, 48)
        >>> Spec.parse(spec.to_dict()) == spec
        True
    """

    base: str | None = None
    base_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, tuple[Size, ...]] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, AttributeValue] = dataclasses.field(default_factory=dict)
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    format: int = FORMAT
    outline: Outline | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every field and make it immutable.

        Raises:
            ArtifactError: an unknown format, a value of the wrong type, or base_args that would load something.
        """
        if not is_int(self.format) or self.format != FORMAT:
            raise make_spec_error("format", self.format, f"{FORMAT} (a newer one needs a newer timm-autoslim)")
        if self.base is not None and not (isinstance(self.base, str) and len(self.base) <= MAX_ITEMS):
            raise make_spec_error("base", self.base, "a name, or None")
        for name in ("base_args", "sizes", "attributes", "widths"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise make_spec_error(name, value, "a mapping from names")
        refused = sorted(FORBIDDEN_ARGS & set(self.base_args))
        if refused:
            where = f"base_args.{refused[0]}"
            raise make_spec_error(where, self.base_args[refused[0]], "only arguments that shape the base")
        object.__setattr__(self, "base_args", freeze("base_args", self.base_args))
        checked: dict[str, dict[str, Any]] = {
            "sizes": {name: _parse_sizes(name, value) for name, value in self.sizes.items()},
            "attributes": {path: _parse_attribute(path, value) for path, value in self.attributes.items()},
            "widths": {name: _parse_width(name, value) for name, value in self.widths.items()},
        }
        for name, value in checked.items():
            object.__setattr__(self, name, MappingProxyType(value))

    @classmethod
    def parse(cls, data: object) -> Spec:
        """Return the spec that JSON data hold; a spec is returned as it is.

        Args:
            data: what `to_dict` returned, or a stranger wrote in its place: anything at all.

        Raises:
            ArtifactError: a key is missing or unknown, or its value is none that a spec may have.
        """
        if isinstance(data, Spec):
            return data
        if not isinstance(data, Mapping) or set(data) != set(_KEYS):
            got = sorted(map(str, data)) if isinstance(data, Mapping) else data
            raise make_spec_error("keys", got, f"a mapping with exactly {', '.join(_KEYS)}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON data, from which `parse` returns an equal spec."""
        return {key: thaw(getattr(self, key)) for key in _KEYS}

    def replace(self, **changes: Any) -> Spec:
        """Return a spec with other values of these fields, checked like all others.

        Raises:
            ArtifactError: as for `parse`.
        """
        return dataclasses.replace(self, **changes)

    def narrow(
        self, slices: Slices, saved: set[str], widths: Mapping[str, int], outline: Outline | None = None
    ) -> Spec:
        """Return the spec of a subnet of the model that this is the spec of.

        Args:
            slices: what the subnet keeps of this model's tensors.
            saved: the names in the model's state dict. All other tensors come from the base again, so the spec must say
                which of their channels stay, not only how many, and what their number is.
            widths: the width of each channel group.
            outline: of the subnet.
        """
        sizes: dict[str, Any] = dict(self.sizes)
        for name, axes in slices.tensors.items():
            if any(axis is not None for axis in axes):
                sizes[name] = [
                    size if runs is None else sum(n for _, n in runs) if name in saved else compose_runs(runs, size)
                    for size, runs in zip(self.sizes.get(name, [None] * len(axes)), axes, strict=True)
                ]
        numbers = {path: value for path, value in slices.attributes.items() if path not in saved}
        attributes: dict[str, Any] = {**self.attributes, **numbers}
        if self.from_torchvision:
            attributes = {p: value for p, value in attributes.items() if p.partition(".")[0] not in _TIMM_ONLY}
        return self.replace(sizes=sizes, attributes=attributes, widths=widths, outline=outline)

    @property
    def from_torchvision(self) -> bool:
        """Whether the base is a torchvision model."""
        return self.base is not None and self.base.startswith(TORCHVISION)

    def require_base(self) -> str:
        """Return the name of the base.

        Raises:
            ArtifactError: the spec has none.
        """
        if self.base is None:
            raise ArtifactError.at(
                "spec 'base'", got="None", needed="the name that creates the base", remedy="export with base="
            )
        return self.base

    def copy_arguments(self) -> dict[str, Any]:
        """Return a copy of `base_args` as JSON returns them, with lists and dicts."""
        arguments: dict[str, Any] = thaw(self.base_args)
        return arguments

    def __repr__(self) -> str:
        widths = f"{len(self.sizes)} sizes, {len(self.attributes)} attributes, {len(self.widths)} widths"
        return f"Spec(base={self.base!r}, base_args={self.copy_arguments()}, {widths})"

    def __deepcopy__(self, memo: object) -> Spec:
        return self

    def __reduce__(self) -> tuple[Any, ...]:  # read-only mappings cannot be pickled
        return _rebuild, (self.to_dict(), self.outline)


def _rebuild(data: Mapping[str, Any], outline: Outline | None) -> Spec:
    return Spec(**data, outline=outline)


_KEYS = ("format", "base", "base_args", "sizes", "attributes", "widths")


class SpecError(ArtifactError):
    """A part of a spec is none that a spec may have, or does not fit the model.

    Attributes:
        parts: where, what was got and what was needed, from which `advising` makes an error with another remedy.
    """

    parts: Mapping[str, str] = MappingProxyType({})


def make_spec_error(where: str, got: object, needed: str) -> SpecError:
    """Return the error of a part of a spec; `where` is its path, such as `sizes.fc.weight`."""
    where = where if len(where) <= 200 else f"{where[:200]}..."
    parts = {"got": reprlib.repr(got), "needed": needed}
    remedy = "export the model again, with the base= and base_args= that it was created with"
    error = SpecError.at(f"spec {where!r}", **parts, remedy=remedy)
    error.parts = {"where": f"spec {where!r}", **parts}
    return error


@contextlib.contextmanager
def advising(remedy: str) -> Iterator[None]:
    """Give the errors of specs in a block another remedy: that of a folder which `export` did not write."""
    try:
        yield
    except SpecError as error:
        raise ArtifactError.at(**error.parts, remedy=remedy) from error.__cause__


# ------------------------------------------------------------------------------------------------ JSON data


def freeze(where: str, value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return an immutable copy of JSON-like data of a bounded size, of tuples and read-only mappings.

    Args:
        where: what it is, for messages.
        value: the data; tuples count as lists.
        depth: how many levels of containers it may have.

    Raises:
        ArtifactError: another type, a number above `MAX_NUMBER`, more items or levels.
    """
    if isinstance(value, int | float):
        if not abs(value) <= MAX_NUMBER:
            raise make_spec_error(where, value, f"a number of at most {MAX_NUMBER}")
        return value
    if value is None or (isinstance(value, str) and len(value) <= MAX_ITEMS):
        return value
    if depth and isinstance(value, Mapping) and len(value) <= MAX_ITEMS:
        for key in value:
            if not isinstance(key, str) or len(key) > MAX_ITEMS:
                raise make_spec_error(where, key, f"a text key of at most {MAX_ITEMS} letters")
        return MappingProxyType({key: freeze(f"{where}.{key}", item, depth - 1) for key, item in value.items()})
    if depth and isinstance(value, list | tuple) and len(value) <= MAX_ITEMS:
        return tuple(freeze(f"{where}.{i}", item, depth - 1) for i, item in enumerate(value))
    raise make_spec_error(where, value, f"JSON data of at most {MAX_ITEMS} items and {MAX_DEPTH} levels")


def thaw(value: Any) -> Any:
    """Return a copy of frozen data as JSON returns it, of lists and dicts."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


def _parse_sizes(name: str, sizes: object) -> tuple[Size, ...]:
    if not isinstance(sizes, list | tuple):
        raise make_spec_error(f"sizes.{name}", sizes, "a list with a size for each axis")
    return tuple(s if s is None or (type(s) is int and s > 0) else _parse_runs(name, s) for s in sizes)


def _parse_runs(name: str, runs: object) -> tuple[tuple[int, int], ...]:
    """Return ascending runs of (start, length) as tuples."""
    if isinstance(runs, list | tuple) and runs and all(map(_is_run, runs)):
        result = tuple((start, length) for start, length in runs)
        if all(start + length <= following for (start, length), (following, _) in itertools.pairwise(result)):
            return result
    raise make_spec_error(
        f"sizes.{name}", runs, "for each axis None, a positive integer, or ascending runs of its channels"
    )


def _is_run(run: object) -> bool:
    """Whether this is a pair of a start and a length."""
    return isinstance(run, list | tuple) and len(run) == 2 and all(map(is_int, run)) and run[0] >= 0 and run[1] > 0


def _parse_attribute(path: str, value: Any) -> AttributeValue:
    if (is_int(value) and value > 0) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple) and value and all(is_int(item) and item > 0 for item in value):
        return tuple(value)
    raise make_spec_error(
        f"attributes.{path}", value, "a positive integer, a finite number, or a list of positive integers"
    )


def _parse_width(name: str, width: object) -> int:
    if not is_int(width) or width < 1:
        raise make_spec_error(f"widths.{name}", width, "a positive integer")
    return width


# ------------------------------------------------------------------------------------------------ of a model


def derive_spec(model: nn.Module, base: str | None = None, base_args: Mapping[str, Any] | None = None) -> Spec:
    """Return the spec of a model as it stands: its own if it is a slim model, else that of a base.

    Args:
        model: any model.
        base: the name that creates its base. By default that of its spec, or the name that timm gave it.
        base_args: arguments of the base's constructor, beside those that timm says it built the model with.

    Raises:
        ArtifactError: the name or an argument is none that a spec may hold.
    """
    spec = getattr(model, "autoslim", None)
    arguments = _read_timm_arguments(model)
    if base is None and isinstance(spec, Spec):
        base, arguments = spec.base, {**spec.base_args, **arguments}
    elif base is None:
        config = getattr(model, "pretrained_cfg", None)
        base = config.get("architecture") if isinstance(config, Mapping) else None
    if not isinstance(base_args, Mapping | None):
        raise ArtifactError.at("base_args", got=reprlib.repr(base_args), needed="a mapping from names of arguments")
    spec = spec if isinstance(spec, Spec) else Spec()
    return spec.replace(base=base, base_args={**arguments, **(base_args or {})})


def _read_timm_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that timm says it built a model with (since 1.0.31), as far as a spec may hold them."""
    stored = getattr(model, "_model_args", None)
    arguments: dict[str, Any] = {}
    for key, value in stored.items() if isinstance(stored, Mapping) else ():
        if value is None or key in FORBIDDEN_ARGS or key == "taps":  # "taps" is for the loader of slim models alone
            continue
        with contextlib.suppress(ArtifactError):  # a class or function: where it matters, export refuses the model
            arguments[key] = freeze(key, value, MAX_DEPTH - 1)
    return arguments
