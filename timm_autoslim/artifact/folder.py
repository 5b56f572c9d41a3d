"""An exported folder as a stranger may have written it: everything is checked before anything is built or read."""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from torch import Tensor, nn

from timm_autoslim.artifact.construct import ARCHITECTURE
from timm_autoslim.artifact.limits import MAX_ARG, MAX_ELEMENTS, MAX_ITEMS, check_plain
from timm_autoslim.artifact.spec import FORBIDDEN_ARGS, check_recipe
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import is_int

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Bytes. The longest config.json of all of timm's models, label names and all, is some 2 MB.
MAX_CONFIG = 16 * 2**20
MAX_HEADER = 16 * 2**20
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
# timm keeps some of these for itself, so they are refused where config.json's model_args would pass them on.
FORBIDDEN_SETTINGS = frozenset(
    ("checkpoint_path", "weights", "progress", "pruned", "model_cfg", "kwargs_filter", "pretrained_strict")
)
_RESERVED = (FORBIDDEN_ARGS | FORBIDDEN_SETTINGS | {"model_name", "scriptable", "exportable", "no_jit"}) - {"recipe"}
# Where config.json would have weights come from, or how they are read: a folder holds its weights itself.
FOREIGN_SOURCES = ("url", "state_dict", "custom_load", "hf_hub_filename", "label_offset")


@dataclass(frozen=True)
class Header:
    """What the head of a safetensors file says, before any tensor is read.

    Attributes:
        path: the file.
        shapes: by name, the shape of each tensor.
        dtypes: by name, its type in safetensors' notation (`F32`, `I64`).
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(map(math.prod, self.shapes.values()))


def _fail(path: Path, got: str, needed: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: got {got}, needed {needed}; nothing was loaded; get the folder again, or export the model anew"
    )


def check_folder(folder: str | Path) -> None:
    """Check an exported folder from a stranger without building anything.

    Loading makes the same checks. Here every fault is one kind of error, also those that timm would meet by itself.

    Args:
        folder: the folder, as `export` writes it.

    Raises:
        ArtifactError: a file is missing, too large or no regular file; config.json or the head of the weights are
            malformed, or ask for more than the description of a smaller model.
    """
    read_config(Path(folder) / CONFIG)
    read_header(Path(folder) / WEIGHTS)


def _check_file(path: Path) -> int:
    """The size of a regular file, or of the one that a link leads to."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        needed = "a regular file"
        if path.name == WEIGHTS:  # timm's own save_for_hf writes a pickle unless it is told otherwise
            needed += " of safetensors, as export and save_for_hf(safe_serialization=True) write it"
        raise _fail(path, f"a file that cannot be read ({error})", needed) from error
    if not stat.S_ISREG(found.st_mode):
        raise _fail(path, "no regular file", "a regular file")
    return found.st_size


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a config.json.

    Returns:
        Its content; the recipe in it is a checked copy.

    Raises:
        ArtifactError: it is too large, no JSON, or not that of an exported model.
    """
    size = _check_file(path)
    if size > MAX_CONFIG:
        raise _fail(path, f"{size:,} bytes", f"at most {MAX_CONFIG:,}")
    try:
        config = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _fail(path, f"no JSON ({type(error).__name__}: {reprlib.repr(str(error))})", "JSON in UTF-8") from error
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        got = config.get("architecture") if isinstance(config, dict) else config
        raise _fail(path, f"architecture {reprlib.repr(got)}", f"{ARCHITECTURE!r}, an exported model's")
    args = config.get("model_args")
    if not isinstance(args, dict) or "recipe" not in args:
        raise _fail(path, f"model_args {reprlib.repr(args)}", "a mapping that holds the recipe")
    args["recipe"] = check_recipe(args["recipe"])
    check_settings({key: value for key, value in args.items() if key != "recipe"})
    cfg = config.get("pretrained_cfg")
    if not isinstance(cfg, dict):
        raise _fail(path, f"pretrained_cfg {reprlib.repr(cfg)}", "a mapping of data settings")
    check_data_settings({**cfg, **{key: config[key] for key in _OVERRIDES if key in config}})
    return config


_OVERRIDES = ("num_classes", "label_names", "label_descriptions")


def check_settings(args: Mapping[str, Any]) -> None:
    """Check the arguments beside the recipe in config.json's model_args.

    Raises:
        ArtifactError: an argument that does not shape the model, or is not plain data of a bounded size.
    """
    for key, value in args.items():
        where = f"model_args.{key}"
        if key in _RESERVED:
            raise ArtifactError(
                f"recipe {where!r}: got {reprlib.repr(value)}, needed only arguments that shape the model"
            )
        check_plain(where, value)
        size = value if isinstance(value, list | tuple) else [value]
        if key == "in_chans" and not _is_size(value):
            raise ArtifactError(f"recipe {where!r}: got {reprlib.repr(value)}, needed a positive integer")
        if key == "img_size" and not (len(size) <= 2 and all(map(_is_size, size)) and size):
            raise ArtifactError(f"recipe {where!r}: got {reprlib.repr(value)}, needed one or two positive integers")


# ------------------------------------------------------------------------------------------------ data settings


def _is_size(value: object) -> bool:
    return is_int(value) and 1 <= value <= MAX_ARG


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
        and all(isinstance(v, int | float) and abs(v) <= MAX_ARG for v in value)
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
    "num_classes": (lambda value: is_int(value) and 0 <= value <= MAX_ARG, f"an integer from 0 to {MAX_ARG}"),
}


def check_data_settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Check timm's data settings; return those that this timm knows, without foreign places of weights.

    Raises:
        ArtifactError: a value is of the wrong type or out of bounds.
    """
    found: dict[str, Any] = {}
    for field in fields(PretrainedCfg):
        name, value = field.name, cfg.get(field.name)
        if value is None or name in FOREIGN_SOURCES:
            continue
        accepts, needed = _SETTINGS.get(name, (_is_text, "text"))
        if not accepts(value):
            raise ArtifactError(f"pretrained_cfg {name!r}: got {reprlib.repr(value)}, needed {needed}; export anew")
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


# ------------------------------------------------------------------------------------------------ weights


def read_header(path: Path) -> Header:
    """Read the head of a safetensors file, and no tensor.

    Raises:
        ArtifactError: there is none, or it is malformed, or does not fit the length of the file.
    """
    if _check_file(path) < 8:
        raise _fail(path, "a truncated file", "a safetensors file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise _fail(path, f"a head of {length:,} bytes", f"a head of at most {MAX_HEADER:,}")
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise _fail(path, f"no weights ({reprlib.repr(str(error))})", "a complete safetensors file") from error
    return Header(path, shapes, dtypes)


def check_weights(
    header: Header, stored: nn.Module, model: nn.Module, cfg: Mapping[str, Any], other_head: bool, in_chans: int
) -> None:
    """Compare the head of a file with the model that it is to fill, before any tensor is read.

    Args:
        header: of the file.
        stored: what config.json describes.
        model: what is to be filled, which may lack a part of `stored`.
        cfg: its data settings, which name the classifiers and the first convolutions.
        other_head: whether the model has another number of classes than the file, whose classifiers are then dropped.
        in_chans: the channels of the model's images; where the file has others, timm converts the first convolutions.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of another shape or kind.
    """

    def named(key: str) -> tuple[str, ...]:
        names = cfg.get(key) or ()
        return (names,) if isinstance(names, str) else tuple(names)

    heads = {f"{name}.{leaf}" for name in named("classifier") for leaf in ("weight", "bias")} if other_head else set()
    stems = {f"{name}.weight" for name in named("first_conv")} if in_chans != cfg["input_size"][0] else set()
    state = {name: value for name, value in stored.state_dict().items() if isinstance(value, Tensor)}
    fresh = [] if model is stored else sorted(model.state_dict().keys() - state.keys())
    for name in (*fresh, *state, *(header.shapes.keys() - state.keys())):
        tensor, shape = state.get(name), header.shapes.get(name)
        if name in heads:
            if shape and math.prod(shape) > MAX_ELEMENTS:
                raise _fail(header.path, f"{name!r} of shape {shape}", f"at most {MAX_ELEMENTS:,} numbers")
            continue
        if tensor is None or shape is None or not _fits(shape, tensor.shape, name in stems):
            want = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
            want = "a tensor" if name in fresh else want
            have = "no such tensor" if shape is None else f"shape {shape}"
            raise _fail(header.path, f"{reprlib.repr(name)}: {have}", f"{want}, as config.json describes the model")
        kind = header.dtypes[name]
        if kind not in (FLOATS if tensor.is_floating_point() else INTEGERS):
            raise _fail(header.path, f"{name!r} of type {kind}", f"numbers like {tensor.dtype}")


def _fits(shape: Sequence[int], needed: Sequence[int], stem: bool) -> bool:
    """Whether two shapes are equal, but for the input channels of a first convolution."""
    return shape == needed or (
        stem and len(shape) == len(needed) > 1 and shape[0] == needed[0] and shape[2:] == needed[2:]
    )
