"""A recipe: how a slimmed model differs from its base, as plain data; checked, and applied to a fresh base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import FeatureInfo
from torch import Tensor, nn

from timm_autoslim.artifact.limits import fail
from timm_autoslim.artifact.spec import check_recipe
from timm_autoslim.slicing.slices import Slices, shrink_model
from timm_autoslim.slicing.tensors import Axis
from timm_autoslim.utils.arguments import is_int

MAX_HEAD_DIM = 2**16


def apply_recipe(model: nn.Module, recipe: Mapping[str, Any]) -> nn.Module:
    """Shrink a freshly created base in place to what its recipe says; everything is checked before anything changes.

    Args:
        model: the recipe's base, as `create_base` returns it.
        recipe: the plain data of an extracted model's `autoslim` attribute. Each size is the length of the prefix
            that is kept of its axis; or the runs that are kept, for tensors that no checkpoint holds.

    Returns:
        The same model, with the recipe as its `autoslim` attribute.

    Raises:
        ArtifactError: the recipe is malformed, or does not fit the model; the model is unchanged.
    """
    return apply_checked(model, check_recipe(recipe))


def apply_checked(model: nn.Module, checked: dict[str, Any]) -> nn.Module:
    """As `apply_recipe`, of a recipe that `check_recipe` returned; it becomes the model's own."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors: dict[str, tuple[Axis, ...]] = {}
    shared: dict[int, tuple[str, tuple[Axis, ...]]] = {}
    for name, sizes in checked["sizes"].items():
        tensor = _tensor(modules, name)
        axes = tensors[name] = _axes(model, name, tensor, sizes)
        first, other = shared.setdefault(id(tensor), (name, axes))
        if axes != other:
            raise fail(f"sizes.{name}", sizes, f"the sizes of {first}, the same tensor")
    for path, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if id(parameter) in shared:  # tied parameters stay tied, whichever of their names the recipe lists
                tensors[f"{path}.{leaf}" if path else leaf] = shared[id(parameter)][1]
    values = {path: _value(model, modules, path, value) for path, value in checked["attributes"].items()}
    shrink_model(model, Slices(tensors=tensors, attributes=values))
    model.autoslim = checked  # type: ignore[assignment]
    return model


def apply_part(model: nn.Module, whole: nn.Module, checked: dict[str, Any]) -> nn.Module:
    """As `apply_checked`, of a base that was built without some of the modules that its recipe tells of.

    Args:
        model: the base as it is wanted.
        whole: the base of the recipe, which is slimmed in place.
        checked: the recipe. What it says of modules that `model` lacks, or that are others there, is left out.
    """
    mine, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, whole))
    part = {
        "sizes": {name: sizes for name, sizes in checked["sizes"].items() if _tensor(mine, name) is not None},
        "attributes": {
            path: value
            for path, value in checked["attributes"].items()
            if _current(model, mine, path) == _current(whole, theirs, path)
        },
    }
    apply_checked(whole, checked)  # the recipe must fit as a whole
    apply_checked(model, {**checked, **part})
    model.autoslim = checked  # type: ignore[assignment]
    return model


def _tensor(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    """The tensor of this name; runs no property of a module."""
    path, _, leaf = name.rpartition(".")
    module = modules.get(path)
    if module is not None:
        for store in (module._parameters, module._buffers, module.__dict__):
            found = store.get(leaf)
            if isinstance(found, Tensor):
                return found
    return None


def _axes(model: nn.Module, name: str, tensor: Tensor | None, sizes: object) -> tuple[Axis, ...]:
    where = f"sizes.{name}"
    if tensor is None:
        raise fail(where, sizes, f"a tensor of {type(model).__name__}, which has none of this name")
    if not isinstance(sizes, list | tuple) or len(sizes) != tensor.ndim:
        raise fail(where, sizes, f"a list of {tensor.ndim} sizes for the shape {tuple(tensor.shape)}")
    axes: list[Axis] = []
    for size, full in zip(sizes, tensor.shape, strict=True):
        if size is None:
            axes.append(None)
        elif type(size) is int and 1 <= size <= full:
            axes.append(((0, size),))
        elif _are_runs(size, full):
            axes.append(tuple(map(tuple, size)))
        else:
            need = f"for each axis None, an integer from 1 to the size in {tuple(tensor.shape)}, or runs within it"
            raise fail(where, sizes, need)
    return tuple(axes)


def _are_runs(size: Any, full: int) -> bool:
    """Whether these are ascending runs of (start, length) within an axis."""
    end = 0
    for run in size if isinstance(size, list | tuple) else ():
        if not isinstance(run, list | tuple) or len(run) != 2 or not all(map(is_int, run)):
            return False
        if not end <= run[0] < run[0] + run[1] <= full:
            return False
        end = run[0] + run[1]
    return end > 0


def _current(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> object:
    """What the base holds under an attribute's path, or None; steps where `set_attributes` does, no further."""
    above, _, leaf = path.rpartition(".")
    module, parts = modules.get(above, model), [leaf]
    if above not in modules:  # within a list, a tuple or a dict of a module
        parts = path.split(".")
        while len(parts) > 1 and isinstance(child := module._modules.get(parts[0]), nn.Module):
            module, parts = child, parts[1:]
    if any(part.startswith("_") for part in parts):
        return None
    found: object = vars(module).get(parts[0])
    for part in parts[1:]:
        if isinstance(found, list | tuple) and part.isdecimal() and part.isascii() and len(part) < 10:
            found = found[int(part)] if int(part) < len(found) else None
        elif isinstance(found, dict):
            found = found.get(part)
        elif isinstance(found, FeatureInfo):
            found = vars(found).get(part)
        else:
            return None
    return found


def _head_dim(scale: object) -> int | None:
    """The n of which a number is n ** -0.5."""
    if isinstance(scale, float) and MAX_HEAD_DIM**-0.5 <= scale <= 1:
        n = round(scale**-2)
        if math.isclose(n**-0.5, scale, rel_tol=1e-6):  # scales of two following n differ by 7e-6 or more
            return n
    return None


def _value(model: nn.Module, modules: Mapping[str, nn.Module], path: str, value: object) -> Any:
    where = f"attributes.{path}"
    now = _current(model, modules, path)
    if is_int(now):
        if not (is_int(value) and 1 <= value <= now):
            raise fail(where, value, f"an integer from 1 to {now}")
        return value
    if isinstance(now, float):
        # the only floats that widths move are scales of attention scores, head_dim ** -0.5
        whole, part = _head_dim(now), _head_dim(value)
        if whole is None or part is None or part > whole or "drop" in path.rpartition(".")[2]:
            raise fail(
                where, value, f"n ** -0.5 of a head of n channels, where the base has such a scale of more, not {now}"
            )
        return value
    if isinstance(now, Sequence) and not isinstance(now, str) and now and all(map(is_int, now)):
        given = value if isinstance(value, list | tuple) and len(value) == len(now) else [0] * len(now)
        if not all(is_int(v) and 1 <= v <= n for v, n in zip(given, now, strict=True)):
            raise fail(where, value, f"{len(now)} positive integers, none above {tuple(now)}")
        return list(given) if isinstance(now, list) else tuple(given)
    raise fail(where, value, f"a number or integers of {type(model).__name__}, which has none under this path")
