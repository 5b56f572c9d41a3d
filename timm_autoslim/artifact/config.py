"""The config.json of an exported folder as a frozen value: spec, settings beside it, and timm's data settings."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from timm.models import PretrainedCfg

from timm_autoslim.artifact.spec import (
    ARCHITECTURE,
    FORBIDDEN_ARGS,
    MAX_ITEMS,
    MAX_NUMBER,
    Spec,
    freeze,
    thaw,
)
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import is_int

# timm keeps some of these for itself, so they are refused where config.json's model_args would pass them on.
FORBIDDEN_SETTINGS = frozenset(
    ("checkpoint_path", "weights", "progress", "pruned", "model_cfg", "kwargs_filter", "pretrained_strict")
)
_RESERVED = FORBIDDEN_ARGS | FORBIDDEN_SETTINGS | {"model_name", "scriptable", "exportable", "no_jit"}
# Where weights come from, or how they are read: a folder holds its weights itself.
_SOURCES = ("url", "state_dict", "custom_load", "hf_hub_filename", "label_offset")
# What timm reads from the top of a config.json rather than from its data settings.
_OVERRIDES = ("num_classes", "label_names", "label_descriptions")
EXPORT_AGAIN = "export the model again"
GET_AGAIN = f"nothing was loaded; get the folder again, or {EXPORT_AGAIN}"


@dataclasses.dataclass(frozen=True)
class Config:
    """The content of a config.json, checked.

    Attributes:
        spec: how the model differs from its base.
        data: timm's data settings, such as the size of images, the number of classes and the name of the classifier.
        settings: the arguments beside the spec in `model_args`, such as `global_pool`.
    """

    spec: Spec
    data: PretrainedCfg
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, content: object, where: str = "config.json") -> Config:
        """Return what JSON data of a config.json says.

        Args:
            content: anything at all.
            where: the file, for messages.

        Raises:
            ArtifactError: it is not that of an exported model, or a value is of the wrong type or out of bounds.
        """

        def fail(got: str, needed: str, remedy: str = f"get the folder again, or {EXPORT_AGAIN}") -> ArtifactError:
            return ArtifactError.at(where, got=got, needed=needed, remedy=f"nothing was loaded; {remedy}")

        if not isinstance(content, dict) or content.get("architecture") != ARCHITECTURE:
            got = content.get("architecture") if isinstance(content, dict) else content
            raise fail(f"architecture {reprlib.repr(got)}", f"{ARCHITECTURE!r}, an exported model's")
        args, data = content.get("model_args"), content.get("pretrained_cfg")
        if isinstance(args, dict) and "recipe" in args and "spec" not in args:
            raise fail("the format of before the first release ('recipe')", "the spec of the model", EXPORT_AGAIN)
        if not isinstance(args, dict) or "spec" not in args:
            raise fail(f"model_args {reprlib.repr(args)}", "a mapping that holds the spec")
        spec, settings = Spec.parse(args["spec"]), parse_settings(args)
        if not isinstance(data, dict):
            raise fail(f"pretrained_cfg {reprlib.repr(data)}", "a mapping of data settings")
        overrides = {key: content[key] for key in _OVERRIDES if key in content}
        return cls(spec, parse_data_settings({**data, **overrides}), settings)

    def to_dict(self, num_features: int, global_pool: str | None) -> dict[str, Any]:
        """Return JSON data in the form of timm's `save_for_hf`, from which `parse` returns an equal value.

        Args:
            num_features: the model's, for readers: loading does not need it.
            global_pool: the model's pooling, for readers too.
        """
        return {
            "architecture": ARCHITECTURE,
            "num_classes": self.data.num_classes,
            "num_features": num_features,
            **({"global_pool": global_pool} if global_pool else {}),
            "model_args": self.to_model_args(),
            "pretrained_cfg": self.data.to_dict(remove_source=True),
        }

    def to_model_args(self) -> dict[str, Any]:
        """Return the arguments of the loader as JSON data: the spec, and the settings beside it."""
        return {"spec": self.spec.to_dict(), **thaw(self.settings)}


def refuse_forbidden(arguments: Mapping[str, Any]) -> None:
    """Raise an ArtifactError if one of the keyword arguments of a loader would do more than shape the model."""
    refused = sorted(FORBIDDEN_SETTINGS & set(arguments))
    if refused:
        raise _make_settings_error(refused[0], arguments[refused[0]], "only arguments that shape the model")


def parse_settings(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments beside the spec in config.json's model_args, checked and immutable.

    Raises:
        ArtifactError: an argument that does not shape the model, or is no JSON data of a bounded size.
    """
    settings: dict[str, Any] = {}
    for key, value in args.items():
        if key == "spec":
            continue
        if key in _RESERVED:
            raise _make_settings_error(key, value, "only arguments that shape the model")
        settings[key] = freeze(f"model_args.{key}", value)
        size = value if isinstance(value, list | tuple) else [value]
        if key == "in_chans" and not _is_size(value):
            raise _make_settings_error(key, value, "a positive integer")
        if key == "img_size" and not (len(size) <= 2 and all(map(_is_size, size)) and size):
            raise _make_settings_error(key, value, "one or two positive integers")
    return MappingProxyType(settings)


def _make_settings_error(key: str, value: object, needed: str) -> ArtifactError:
    return ArtifactError.at(f"model_args.{key}", got=reprlib.repr(value), needed=needed, remedy=EXPORT_AGAIN)


# ------------------------------------------------------------------------------------------------ data settings


def parse_data_settings(cfg: Mapping[str, Any]) -> PretrainedCfg:
    """Return timm's data settings, checked: those that this timm knows, without places that weights would come from.

    Raises:
        ArtifactError: a value is of the wrong type or out of bounds.
    """
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(PretrainedCfg):
        name, value = field.name, cfg.get(field.name)
        if value is None or name in _SOURCES:
            continue
        accepts, needed = _SETTINGS.get(name, (_is_text, "text"))
        if not accepts(value):
            where = f"pretrained_cfg {name!r}"
            raise ArtifactError.at(where, got=reprlib.repr(value), needed=needed, remedy=EXPORT_AGAIN)
        settings[name] = tuple(value) if isinstance(value, list) else value
    return PretrainedCfg(**settings)


def _is_size(value: object) -> bool:
    return is_int(value) and 1 <= value <= MAX_NUMBER


def _is_image(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_size, value))


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_ITEMS


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 100 * MAX_ITEMS


def _are_names(value: object) -> bool:
    names = value if isinstance(value, list | tuple) else [value]
    return len(names) <= MAX_ITEMS and all(_is_text(name) for name in names)


def _are_numbers(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and 0 < len(value) <= MAX_ITEMS
        and all(isinstance(v, int | float) and abs(v) <= MAX_NUMBER for v in value)
    )


def _are_labels(value: object) -> bool:
    texts = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(texts, list | tuple) and all(_is_text(text) for text in texts)


_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), (_is_image, "three positive integers")),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), (_is_share, "a positive number")),
    **dict.fromkeys(("mean", "std"), (_are_numbers, "numbers")),
    **dict.fromkeys(("pool_size", "test_pool_size"), (_are_numbers, "integers")),
    **dict.fromkeys(("first_conv", "classifier"), (_are_names, "names of modules")),
    **dict.fromkeys(("label_names", "label_descriptions"), (_are_labels, "texts")),
    **dict.fromkeys(("paper_ids", "notes"), (_are_names, "texts")),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    "num_classes": (lambda value: is_int(value) and 0 <= value <= MAX_NUMBER, f"an integer from 0 to {MAX_NUMBER}"),
}
