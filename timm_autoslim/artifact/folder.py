"""The files of an exported folder: how they are written; and, for strangers write them too, how they are checked."""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import Tensor, nn

from timm_autoslim.artifact.config import GET_AGAIN, Config
from timm_autoslim.artifact.limits import MAX_ELEMENTS
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import check_path
from timm_autoslim.utils.files import replace_file

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Bytes. The longest config.json of all of timm's models, label names and all, is some 2 MB.
MAX_CONFIG = 16 * 2**20
MAX_HEADER = 16 * 2**20
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def _make_error(path: Path, got: str, needed: str) -> ArtifactError:
    return ArtifactError.at(str(path), got=got, needed=needed, remedy=GET_AGAIN)


def check_folder(folder: str | Path) -> None:
    """Check an exported folder from a stranger without building anything.

    Loading makes the same checks. Here every fault is one kind of error, also those that timm would find by itself.

    Args:
        folder: the folder, as `export` writes it.

    Raises:
        ArtifactError: the folder is no path; a file is missing, too large or no regular file; config.json or the header
            of the weights is malformed, or asks for more than the description of a smaller model.

    Example:
        >>> from timm_autoslim import AutoSlimError, check_folder
        >>> try:
        ...     check_folder("nowhere")
        ... except AutoSlimError as error:
        ...     print(str(error).partition(";")[2])
         needed: a regular file; nothing was loaded; get the folder again, or export the model again
    """
    folder = check_path("folder", folder, ArtifactError)
    read_config(folder / CONFIG)
    read_header(folder / WEIGHTS)


def _check_file(path: Path) -> int:
    """Return the size of a regular file in bytes, or of the one that a link leads to."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        needed = "a regular file"
        if path.name == WEIGHTS:  # timm's own save_for_hf writes a pickle unless it is told otherwise
            needed += " of safetensors, as export and save_for_hf(safe_serialization=True) write it"
        raise _make_error(path, f"a file that cannot be read ({error})", needed) from error
    if not stat.S_ISREG(status.st_mode):
        raise _make_error(path, "no regular file", "a regular file")
    return status.st_size


def read_json(path: Path) -> Any:
    """Read a JSON file of a bounded size.

    Raises:
        ArtifactError: it cannot be read, is too large or no JSON.
    """
    size = _check_file(path)
    if size > MAX_CONFIG:
        raise _make_error(path, f"{size:,} bytes", f"at most {MAX_CONFIG:,}")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _make_error(
            path, f"no JSON ({type(error).__name__}: {reprlib.repr(str(error))})", "JSON in UTF-8"
        ) from error


def read_config(path: Path) -> Config:
    """Read and check a config.json.

    Raises:
        ArtifactError: it is too large, no JSON, or not that of an exported model.
    """
    return Config.parse(read_json(path), str(path))


# ------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says, before any tensor is read.

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
        """How many elements all tensors have."""
        return sum(map(math.prod, self.shapes.values()))


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and no tensor.

    Raises:
        ArtifactError: there is none, or it is malformed, or does not fit the length of the file.
    """
    if _check_file(path) < 8:
        raise _make_error(path, "a truncated file", "a safetensors file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise _make_error(path, f"a header of {length:,} bytes", f"a header of at most {MAX_HEADER:,}")
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise _make_error(path, f"no weights ({reprlib.repr(str(error))})", "a complete safetensors file") from error
    return Header(path, shapes, dtypes)


def check_weights(
    header: Header,
    exported: nn.Module,
    model: nn.Module,
    data: PretrainedCfg,
    *,
    skip_classifiers: bool,
    in_chans: int,
) -> None:
    """Compare the header of a file with the model that it is to fill, before any tensor is read.

    Args:
        header: of the file.
        exported: the model that config.json describes.
        model: what is to be filled, which may lack a part of `exported`.
        data: its data settings, which name the classifiers and the first convolutions.
        skip_classifiers: whether timm will drop the file's classifiers, so that their shapes do not matter.
        in_chans: the channels of the model's images; where the file has others, timm converts the first convolutions.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of another shape or kind.
    """
    heads = {f"{name}.{leaf}" for name in _list_names(data.classifier) for leaf in ("weight", "bias")}
    heads = heads if skip_classifiers else set()
    stems = {f"{name}.weight" for name in _list_names(data.first_conv)} if in_chans != data.input_size[0] else set()
    state = {name: value for name, value in exported.state_dict().items() if isinstance(value, Tensor)}
    new = [] if model is exported else sorted(model.state_dict().keys() - state.keys())
    for name in (*new, *state, *(header.shapes.keys() - state.keys())):
        tensor, shape = state.get(name), header.shapes.get(name)
        if name in heads:
            if shape and math.prod(shape) > MAX_ELEMENTS:
                raise _make_error(header.path, f"{name!r} of shape {shape}", f"at most {MAX_ELEMENTS:,} numbers")
            continue
        if tensor is None or shape is None or not _fits(shape, tensor.shape, name in stems):
            got = "no such tensor" if shape is None else f"shape {shape}"
            needed = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
            needed = "a tensor" if name in new else needed
            raise _make_error(
                header.path, f"{reprlib.repr(name)}: {got}", f"{needed}, as config.json describes the model"
            )
        if not is_kind(header.dtypes[name], tensor):
            got = f"{name!r} of type {header.dtypes[name]}"
            raise _make_error(header.path, got, f"numbers like {tensor.dtype}")


def is_kind(dtype: str, tensor: Tensor) -> bool:
    """Whether a type, in safetensors' notation, is of the kind of a tensor's: floating point or integers."""
    return dtype in (FLOATS if tensor.is_floating_point() else INTEGERS)


def _list_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names in one of timm's data settings, which holds none, one or several."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _fits(shape: Sequence[int], needed: Sequence[int], stem: bool) -> bool:
    """Whether two shapes are equal, but for the input channels of a first convolution."""
    return shape == needed or (
        stem and len(shape) == len(needed) > 1 and shape[0] == needed[0] and shape[2:] == needed[2:]
    )


# ------------------------------------------------------------------------------------------------ writing


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Return clones of a model's state, on the CPU.

    safetensors refuses tensors that share memory, and tied parameters need both of their names.
    """
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def write_files(folder: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write the weights and the config.json of a model.

    Raises:
        ArtifactError: safetensors cannot hold the tensors.
    """
    with replace_file(folder / WEIGHTS) as part:  # gives it the rights that any new file has
        try:
            save_file(dict(tensors), part, metadata={"format": "pt"})
        except (SafetensorError, ValueError, KeyError) as error:
            got = f"a state that safetensors cannot hold ({type(error).__name__}: {str(error)[:200]})"
            raise ArtifactError.at("the model", got=got, needed="tensors of numbers") from error
    text = json.dumps(content, indent=2, allow_nan=False)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
