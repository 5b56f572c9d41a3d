"""What a model looks like beside its weights: modules, shapes, numbers and settings, to be compared with it later."""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from timm_autoslim.artifact.settings import ForwardNames, Setting, is_compared, is_torchs, read_setting
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.dropouts import is_dropout
from timm_autoslim.utils.forwards import list_stored_names
from timm_autoslim.utils.tensors import find_tied_names

_MENTIONED = 3  # so many changes are named
_LONGEST = 200  # letters of a change that is named
_ABSENT = object()
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

Paths = Sequence[tuple[str, nn.Module]]  # modules by path


@dataclass(frozen=True)
class Outline:
    """Modules, names, shapes and numbers of a model at one time. Values, types and devices of weights are none of it.

    Attributes:
        shapes: of all parameters, by all of their names.
        tensors: the shapes of the buffers and tensor attributes that are sliced.
        ties: for each further name of a tied parameter, its first name.
        attributes: the attributes that change with the widths, by path.
        numbers: hyperparameters of torch's modules that are integers, such as a stride; and public attributes that are
            lists of integers, such as the size of the images.
        modules: by path, the class of every module, with its forward hooks, and whether it has a forward of its own.
            Those that pass everything on in evaluation, such as a dropout, are left out.
        settings: further attributes that are numbers, flags, texts or functions, such as the eps of a norm; but none
            that serves training alone, by its name. A function is its name, with the constants that it was made with:
            the arguments of a partial, and of one that a function has made, defaults and variables of its closure.
        written: paths of attributes that the model's own forward changes, which are in none of these.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    written: tuple[str, ...] = ()

    @classmethod
    def draw(
        cls, model: nn.Module, tensors: Iterable[str], attributes: Iterable[str], written: Collection[str] = ()
    ) -> Outline:
        """Draw the outline of a model as it is.

        Args:
            model: any model.
            tensors: names of the tensors that are sliced.
            attributes: paths of the attributes that change with the widths.
            written: paths of attributes that the model's own forward was seen to change; those that its code stores
                are added.
        """
        modules = list(model.named_modules())
        shapes, written = _read_shapes(model), {*written, *_list_stored(modules)}
        values = {path: _find_attribute(model, path) for path in attributes}
        values = {path: value for path, value in values.items() if _is_number(value)}
        numbers = {path: value for path, value in _list_numbers(modules) if path not in written}
        settings = dict(_list_settings(modules))
        return cls(
            shapes=shapes,
            tensors=_read_tensor_shapes(model, [name for name in tensors if name not in shapes]),
            ties=_find_ties(model),
            attributes=values,
            numbers=numbers,
            modules=dict(_list_modules(model)),
            settings={p: v for p, v in settings.items() if p not in written and p not in values and p not in numbers},
            written=tuple(sorted(written)),
        )

    def list_changes(self, model: nn.Module) -> Iterator[str]:
        """Yield, in words, what slices and costs follow from and has changed in a model: no modules, no settings."""
        yield from self._compare_tensors(model)
        for path, value in {**self.attributes, **self.numbers}.items():
            number = _find_attribute(model, path)
            if number != value:
                yield f"{path} is {'gone' if number is _ABSENT else number}, and was {value}"

    def list_differences(self, model: nn.Module) -> Iterator[str]:
        """Yield, in words, all that is different in a model.

        But no attribute that it lacks, which a run may leave, and no number or setting whose name is nowhere in the
        code of its forward, such as the date of its creation.
        """
        modules = dict(_list_modules(model))
        for path in {**self.modules, **modules}:
            now, before = modules.get(path), self.modules.get(path)
            if now != before:
                yield f"{path or 'the model'} {_describe_module(_get_module(model, path), now, before)}"
        yield from self._compare_tensors(model)
        names = ForwardNames(model)
        for path, value in {**self.attributes, **self.numbers, **self.settings}.items():
            setting = read_setting(_find_attribute(model, path))
            if setting is None or setting == value:
                continue
            above, _, leaf = path.rpartition(".")
            module = _get_module(model, above)
            if path in self.attributes or module is None or names.may_read(module, leaf):
                yield f"{path} is {setting}, and was {value}"

    def _compare_tensors(self, model: nn.Module) -> Iterator[str]:
        shapes, ties = _read_shapes(model) | _read_tensor_shapes(model, self.tensors), _find_ties(model)
        before_shapes = {**self.shapes, **self.tensors}
        for name in {**before_shapes, **shapes}:
            now, before = shapes.get(name), before_shapes.get(name)
            if now != before:
                yield f"{name} {_describe_shape(now, before)}"
        for name in {**self.ties, **ties}:
            tie, before_tie = ties.get(name), self.ties.get(name)
            if tie != before_tie and name in shapes:
                yield f"{name} is {_describe_tie(tie)}, and was {_describe_tie(before_tie)}"

    # -------------------------------------------------------------------------------------------- JSON data

    def to_dict(self) -> dict[str, Any]:
        """Return the outline as JSON data, from which `parse` returns an equal one."""
        parts = {key: {k: _to_json(v) for k, v in getattr(self, key).items()} for key in _MAPPINGS}
        return {**parts, "written": list(self.written)}

    @classmethod
    def parse(cls, data: object) -> Outline:
        """Return the outline that JSON data hold.

        Args:
            data: what `to_dict` returned, or a stranger wrote in its place.

        Raises:
            ArtifactError: they are something else.
        """
        if not isinstance(data, Mapping) or set(data) != {*_MAPPINGS, "written"}:
            raise _make_error("keys", data)
        written = data["written"]
        if not isinstance(written, list) or not all(isinstance(path, str) for path in written):
            raise _make_error("written", written)
        parts: dict[str, dict[str, Any]] = {}
        for key, kinds in _MAPPINGS.items():
            values = data[key]
            if not isinstance(values, Mapping) or not all(isinstance(v, kinds) for v in values.values()):
                raise _make_error(key, values)
            parts[key] = {str(k): tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**parts, written=tuple(written))


_VALUES = (bool, int, float, str, list)
_MAPPINGS: dict[str, tuple[type, ...]] = {
    "shapes": (list,),
    "tensors": (list,),
    "ties": (str,),
    "attributes": _VALUES,
    "numbers": _VALUES,
    "modules": (str,),
    "settings": _VALUES,
}


def _make_error(where: str, got: object) -> ArtifactError:
    needed = "an outline, as save() writes it"
    return ArtifactError.at(f"outline {where!r}", got=reprlib.repr(got), needed=needed, remedy="save the model again")


def _to_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def join_changes(changes: Collection[str]) -> str:
    """Return the first few changes as one text; empty if there are none."""
    texts = [c if len(c) <= _LONGEST else f"{c[:_LONGEST]}..." for c in [*changes][:_MENTIONED]]
    more = f" and {len(changes) - _MENTIONED} more" if len(changes) > _MENTIONED else ""
    return f"{'; '.join(texts)}{more}"


# ------------------------------------------------------------------------------------------------ tensors


def _read_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by all of their names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        # a replica of DataParallel has its parameters elsewhere
        parameters = getattr(module, "_former_parameters", None) or module._parameters
        for leaf, tensor in parameters.items():
            if tensor is not None:
                shapes[f"{path}.{leaf}" if path else leaf] = tuple(tensor.shape)
    return shapes


def _read_tensor_shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of these buffers and tensor attributes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = _get_module(model, path)
        for store in () if module is None else (module._buffers, module.__dict__):
            tensor = store.get(leaf)
            if isinstance(tensor, Tensor):
                shapes[name] = tuple(tensor.shape)
    return shapes


def _find_ties(model: nn.Module) -> dict[str, str]:
    """Return, for each further name of a tied parameter, its first name."""
    ties = find_tied_names(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)} if ties else set()
    return {name: first for name, first in ties.items() if name in parameters}


# ------------------------------------------------------------------------------------------------ attributes


def _get_module(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = None if module is None else module._modules.get(part)
    return module


def find_entry(model: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """Return the dict that holds an attribute, and its key there; an empty dict if nothing has this path."""
    above, _, leaf = path.rpartition(".")
    module = _get_module(model, above)
    return ({} if module is None else module.__dict__), leaf


def _find_attribute(model: nn.Module, path: str) -> Any:
    """Return a module's own attribute, a list as a tuple; `_ABSENT` if there is none, or it is inside of another."""
    store, key = find_entry(model, path)
    value = store.get(key, _ABSENT)
    return tuple(value) if type(value) is list else value


def _list_stored(modules: Paths) -> Iterator[str]:
    """Yield the paths of the attributes that forwards store."""
    for path, module in modules:
        for name in list_stored_names(type(module)) & module.__dict__.keys():
            yield f"{path}.{name}" if path else name


def _is_number(value: object) -> bool:
    """Whether a value that follows the widths is an outline's: no tensor, and nothing that others are in."""
    return isinstance(value, int | float | tuple)


def _list_numbers(modules: Paths) -> Iterator[tuple[str, Any]]:
    """Yield the hyperparameters of modules that are integers, and all attributes that are lists of integers."""
    for path, module in modules:
        constants = getattr(type(module), "__constants__", ())  # torch's modules name theirs so
        for name, value in module.__dict__.items():
            is_list = type(value) in (tuple, list) and value and all(type(item) is int for item in value)
            if not name.startswith("_") and (is_list or (type(value) is int and name in constants)):
                yield f"{path}.{name}" if path else name, tuple(value) if is_list else value


def _list_settings(modules: Paths) -> Iterator[tuple[str, Setting]]:
    """Yield the attributes of modules that are settings."""
    for path, module in modules:
        if _passes_on(module):
            continue
        hides_state = is_torchs(type(module))  # in private attributes, which follow from the others
        for name, value in module.__dict__.items():
            if name in _OF_EVERY_MODULE or name == "forward" or (hides_state and name.startswith("_")):
                continue
            setting = read_setting(value)
            if setting is not None and is_compared(name, value):
                yield f"{path}.{name}" if path else name, setting


# ------------------------------------------------------------------------------------------------ modules


def _list_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the modules by all of their paths, in words."""
    for path, module in model.named_modules(remove_duplicate=False):
        if not _passes_on(module):
            yield path, _name_module(module)


def _passes_on(module: nn.Module) -> bool:
    """Whether a module returns its input in evaluation."""
    return (type(module) is nn.Identity or is_dropout(module)) and not _list_marks(module)


def _name_module(module: nn.Module) -> str:
    """Return the class of a module and what else says what its call does.

    BatchNorm has one name for all dimensions and processes, since training in several processes replaces its class.
    """
    kind = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        kind = re.sub(r"^Sync|[123]d(?=$|Act)", "", kind)
    return " with ".join((kind, *_list_marks(module)))


def _list_marks(module: nn.Module) -> list[str]:
    """Return what makes a call of a module other than its class says, in words."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    forward = module.__dict__.get("forward")
    names = ", ".join(str(read_setting(hook) or type(hook).__name__) for hook in hooks)
    marks = [f"{len(hooks)} forward hook{'s' if hooks[1:] else ''} ({names})"] if hooks else []
    if forward is not None:
        forward = inspect.unwrap(forward)  # mixed precision and compilation wrap the forward of the class
        forward = getattr(forward, "__func__", forward)
        if forward is not inspect.unwrap(type(module).forward):
            marks.append(f"a forward of its own ({getattr(forward, '__name__', type(forward).__name__)})")
    return marks


def _describe_module(module: nn.Module | None, now: str | None, before: str | None) -> str:
    if module is None:
        return f"is gone, and was: {before}"
    return f"is new: {now}" if before is None else f"is: {now or _name_module(module)}, and was: {before}"


def _describe_shape(now: tuple[int, ...] | None, before: tuple[int, ...] | None) -> str:
    if now is None:
        return "is gone"
    return f"has the shape {now}, and had {before}" if before is not None else f"is new, of the shape {now}"


def _describe_tie(name: str | None) -> str:
    return "not tied" if name is None else f"tied to {name}"
