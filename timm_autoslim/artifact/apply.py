"""Apply a spec to a fresh base: what fits the base is kept of it, what does not is refused before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from timm_autoslim.artifact.spec import AttributeValue, Size, Spec, make_spec_error
from timm_autoslim.slicing.attributes import read_member
from timm_autoslim.slicing.slices import Slices, shrink_model
from timm_autoslim.slicing.tensors import Axis
from timm_autoslim.utils.arguments import is_int

MAX_HEAD_DIM = 2**16
# The powers of the number of channels that attention scores are multiplied or divided by.
SCALES = (-0.5, -1.0, 0.5, 1.0)


def apply_spec(model: nn.Module, spec: Spec) -> nn.Module:
    """Shrink a freshly created base in place to what its spec says; everything is checked before anything changes.

    Args:
        model: the spec's base, as `create_base` returns it.
        spec: the spec, such as an extracted model's `autoslim` attribute.

    Returns:
        The same model, with the spec as its `autoslim` attribute.

    Raises:
        ArtifactError: the spec does not fit the model; the model is unchanged.
    """
    shrink_model(model, find_slices(model, spec.sizes, spec.attributes))
    model.autoslim = spec  # type: ignore[assignment]
    return model


def apply_common(model: nn.Module, base: nn.Module, spec: Spec) -> nn.Module:
    """As `apply_spec`, of a base that was built without some of the modules that its spec names.

    Args:
        model: the base as it was asked for.
        base: the base as the spec describes it; it is slimmed too, which proves that the spec fits.
        spec: the spec. What it says of modules that `model` lacks, or that differ there, is left out.
    """
    modules, base_modules = (dict(m.named_modules(remove_duplicate=False)) for m in (model, base))
    sizes = {name: sizes for name, sizes in spec.sizes.items() if _find_tensor(modules, name) is not None}
    attributes = {
        path: value
        for path, value in spec.attributes.items()
        if read_attribute(model, modules, path) == read_attribute(base, base_modules, path)
    }
    apply_spec(base, spec)
    shrink_model(model, find_slices(model, sizes, attributes))
    model.autoslim = spec  # type: ignore[assignment]
    return model


def find_slices(
    model: nn.Module,
    sizes: Mapping[str, tuple[Size, ...]],
    attributes: Mapping[str, AttributeValue],
    powers: Sequence[float] = (-0.5,),
) -> Slices:
    """Return the slices of a model that a spec describes; the model stays as it is.

    Args:
        model: the original.
        sizes, attributes: of a spec.
        powers: floats may follow widths as such powers of the number of channels.

    Raises:
        ArtifactError: these do not fit the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    slices: dict[str, tuple[Axis, ...]] = {}
    shared: dict[int, tuple[str, tuple[Axis, ...]]] = {}
    for name, axis_sizes in sizes.items():
        tensor = _find_tensor(modules, name)
        axes = slices[name] = _find_axes(model, name, tensor, axis_sizes)
        first, first_axes = shared.setdefault(id(tensor), (name, axes))
        if axes != first_axes:
            raise make_spec_error(f"sizes.{name}", axis_sizes, f"the sizes of {first}, the same tensor")
    for path, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if id(parameter) in shared:  # tied parameters stay tied, whichever of their names the spec lists
                slices[f"{path}.{leaf}" if path else leaf] = shared[id(parameter)][1]
    values = {path: _check_attribute(model, modules, path, value, powers) for path, value in attributes.items()}
    return Slices(tensors=slices, attributes=values)


def _find_tensor(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    """Return the tensor of this name; runs no property of a module."""
    path, _, leaf = name.rpartition(".")
    module = modules.get(path)
    if module is not None:
        for store in (module._parameters, module._buffers, module.__dict__):
            value = store.get(leaf)
            if isinstance(value, Tensor):
                return value
    return None


def _find_axes(model: nn.Module, name: str, tensor: Tensor | None, sizes: tuple[Size, ...]) -> tuple[Axis, ...]:
    """Return what is kept of each axis of a tensor."""
    where = f"sizes.{name}"
    if tensor is None:
        raise make_spec_error(where, sizes, f"a tensor of {type(model).__name__}, which has none of this name")
    if len(sizes) != tensor.ndim:
        raise make_spec_error(where, sizes, f"a list of {tensor.ndim} sizes for the shape {tuple(tensor.shape)}")
    axes: list[Axis] = [((0, size),) if isinstance(size, int) else size for size in sizes]
    for runs, length in zip(axes, tensor.shape, strict=True):
        if runs is not None and sum(runs[-1]) > length:
            needed = f"for each axis None, an integer from 1 to the size in {tuple(tensor.shape)}, or runs within it"
            raise make_spec_error(where, sizes, needed)
    return tuple(axes)


# ------------------------------------------------------------------------------------------------ attributes


def read_attribute(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> object:
    """Return what the base holds under an attribute's path, or None; follows `set_attributes`, no further."""
    above, _, leaf = path.rpartition(".")
    module, parts = modules.get(above, model), [leaf]
    if above not in modules:  # within a list, a tuple or a dict of a module
        parts = path.split(".")
        while len(parts) > 1 and isinstance(child := module._modules.get(parts[0]), nn.Module):
            module, parts = child, parts[1:]
    if parts[0].startswith("_") or any(part.startswith("__") for part in parts):
        return None
    value: object = vars(module).get(parts[0])
    for part in parts[1:]:
        if isinstance(value, list | tuple) and part.isdecimal() and part.isascii() and len(part) < 10:
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = read_member(value, part)
    return value


def _check_attribute(
    model: nn.Module, modules: Mapping[str, nn.Module], path: str, value: AttributeValue, powers: Sequence[float]
) -> Any:
    """Return a value of the type that the base has under this path; it may only be smaller."""
    where = f"attributes.{path}"
    full = read_attribute(model, modules, path)
    if is_int(full):
        if not (is_int(value) and value <= full):
            raise make_spec_error(where, value, f"an integer from 1 to {full}")
        return value
    if isinstance(full, float):
        scaled = any(_is_narrower_scale(value, full, power) for power in powers)
        if not scaled or "drop" in path.rpartition(".")[2]:
            power = " or ".join(f"n ** {power:g}" for power in powers)
            needed = f"{power} of a head of n channels, where the base has such a scale of more, not {full}"
            raise make_spec_error(where, value, needed)
        return value
    if isinstance(full, Sequence) and not isinstance(full, str) and full and all(map(is_int, full)):
        values = value if isinstance(value, tuple) else ()
        if len(values) != len(full) or not all(v <= n for v, n in zip(values, full, strict=True)):
            raise make_spec_error(where, value, f"{len(full)} positive integers, none above {tuple(full)}")
        return list(values) if isinstance(full, list) else values
    raise make_spec_error(
        where, value, f"a number or integers of {type(model).__name__}, which has none under this path"
    )


def _is_narrower_scale(scale: object, full: float, power: float) -> bool:
    """Whether both are this power of a number of channels, `scale` of no more: no other floats follow widths."""
    channels, full_channels = _find_channels(scale, power), _find_channels(full, power)
    return channels is not None and full_channels is not None and channels <= full_channels


def _find_channels(scale: object, power: float) -> int | None:
    """Return the n of which a number is this power."""
    if isinstance(scale, float) and min(1, MAX_HEAD_DIM**power) <= scale <= max(1, MAX_HEAD_DIM**power):
        n: int = round(scale ** (1 / power))
        if math.isclose(n**power, scale, rel_tol=1e-6):  # scales of two following n differ by 7e-6 or more
            return n
    return None
