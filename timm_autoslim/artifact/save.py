"""Slim models of any class: a folder of widths, sizes and weights, which is applied to a freshly built original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from timm_autoslim.artifact.apply import SCALES, find_slices, read_attribute
from timm_autoslim.artifact.compare import find_unused_modules
from timm_autoslim.artifact.drafts import create_folder, refuse_existing
from timm_autoslim.artifact.folder import (
    CONFIG,
    WEIGHTS,
    Header,
    copy_state,
    is_kind,
    read_header,
    read_json,
    write_files,
)
from timm_autoslim.artifact.outline import Outline, join_changes
from timm_autoslim.artifact.parts import describe_parts
from timm_autoslim.artifact.refusals import refuse_stale, refuse_strangers, refuse_without_numbers, require_spec
from timm_autoslim.artifact.spec import Spec, advising
from timm_autoslim.errors import ArtifactError
from timm_autoslim.slicing.slices import Slices, shrink_model
from timm_autoslim.utils.arguments import check_module, check_path
from timm_autoslim.utils.meta import copy_to_meta

KIND = "timm_autoslim.save"  # the kind of folder, as config.json names it
_UNDO = "undo changes by hand before save(), and make them on the loaded model"
_AS_BUILT = "nothing was loaded; give load() the original, built as it was for convert()"
M = TypeVar("M", bound=nn.Module)


def save(model: nn.Module, out: str | Path, *, example_input: Any = None) -> Path:
    """Write a slim model of any class to a new folder, from which `load` makes it again.

    The folder holds `config.json`, which says how the model differs from its original and what its modules and their
    settings are, and the weights as safetensors.
    It appears at once or not at all. `export` writes folders that need no original, of timm's and torchvision's models.

    A model is refused whose modules or their settings are others than when it was extracted or loaded: another
    activation, `eps`, stride, head or layer, or a forward hook. No original would become it. Weights, statistics, types
    and devices may change, attributes that no code of the forward mentions, and what serves training alone: rates of
    dropout and drop path, `momentum`, gradient checkpointing, SyncBatchNorm.

    Args:
        model: a slim model, as `supernet.extract` returns it, fine-tuned or calibrated.
        out: the folder to create.
        example_input: inputs as `convert` takes them. With them a BatchNorm that does not run in evaluation, such as
            one of an auxiliary head, need not have statistics of its own.

    Returns:
        The folder's path.

    Raises:
        OutputExistsError: `out` exists.
        StaleStatisticsError: BatchNorm statistics of a narrowed model are not its own.
        ArtifactError: the model has no spec or was changed since it got it, has weights that are NaN or on the meta
            device, or a state that safetensors cannot hold; or it is a deep copy whose closures run layers of another.

    Example:
        >>> import tempfile, timm, torch
        >>> from timm_autoslim import convert, load, save
        >>> def build():
        ...     return torch.nn.Sequential(timm.create_model("resnet10t", num_classes=0), torch.nn.Linear(512, 3))
        >>> supernet = convert(build(), torch.zeros(1, 3, 32, 32))
        >>> slim = supernet.extract()
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     folder = save(slim, f"{runs}/slim")
        ...     again = load(folder, build())
        >>> torch.equal(again[1].weight, slim[1].weight)
        True
    """
    folder = check_path("out", out, ArtifactError)
    refuse_existing(folder)
    spec = require_spec(model, "save")
    refuse_without_numbers(model)
    _refuse_changes(model, spec)
    refuse_strangers(model)
    if example_input is None:
        refuse_stale(model, spec, set, "before save; give example_input= if the layer does not run in evaluation")
    else:
        refuse_stale(model, spec, lambda: find_unused_modules(model, [example_input]), "before save")
    tensors = copy_state(model)
    outline = spec.outline or Outline.draw(model, spec.sizes, spec.attributes)
    spec = spec.replace(outline=outline)
    content = {"kind": KIND, "class": type(model).__name__, "spec": spec.to_dict(), "outline": outline.to_dict()}
    with create_folder(folder) as draft:
        write_files(draft, tensors, content)
        _prove_folder(draft, spec, tensors)
    return folder


def load(folder: str | Path, model: M) -> M:
    """Make a freshly built original the slim model that a folder of `save` holds: its widths, and its weights.

    Everything is checked before anything changes, so folders from strangers are safe to load: they hold no code.

    Args:
        folder: as `save` wrote it.
        model: built as the model that was converted, on any device; changed in place.

    Returns:
        The same model, with its spec as `autoslim` attribute.

    Raises:
        ArtifactError: a file is missing or malformed, or does not fit the model, or the model has another module or
            setting (an activation, a stride) than the one that was saved; it is then unchanged.

    Example:
        >>> import tempfile, torch
        >>> from timm_autoslim import convert, load, save
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> supernet = convert(build(), torch.zeros(1, 4))
        >>> slim = supernet.extract(supernet.space.uniform(0.5))
        >>> with tempfile.TemporaryDirectory() as runs:
        ...     again = load(save(slim, f"{runs}/slim"), build())
        >>> again[0].weight.shape, torch.equal(again(torch.ones(1, 4)), slim(torch.ones(1, 4)))
        (torch.Size([4, 4]), True)
    """
    place = check_path("folder", folder, ArtifactError)
    check_module("model", model, ArtifactError)
    spec, header = _read_config(place / CONFIG), read_header(place / WEIGHTS)
    if any(isinstance(t, Tensor) and t.is_meta for t in model.state_dict().values()):
        raise ArtifactError.at("model", got="one on the meta device", needed="a model with data")
    with advising(_AS_BUILT):
        slices = find_slices(model, spec.sizes, spec.attributes, SCALES)
    _check_header(header, model, slices)
    _refuse_other_original(model, slices, spec)
    shrink_model(model, slices)
    model.load_state_dict(load_file(header.path))
    model.autoslim = spec  # type: ignore[assignment]
    describe_parts(model, slices, spec.widths, written=spec.outline.written if spec.outline else ())
    return model


def _read_config(path: Path) -> Spec:
    """Return the spec in a config.json that `save` wrote."""
    content = read_json(path)
    remedy = "nothing was loaded"
    if isinstance(content, Mapping) and "model_args" in content:
        got, remedy = "that of an exported folder", "timm.create_model('local-dir:FOLDER', pretrained=True) loads those"
        raise ArtifactError.at(str(path), got=got, needed="that of timm_autoslim.save", remedy=remedy)
    if not isinstance(content, Mapping) or content.get("kind") != KIND or "spec" not in content:
        raise ArtifactError.at(str(path), got="other JSON", needed="that of timm_autoslim.save", remedy=remedy)
    with advising("nothing was loaded; save the model again"):
        spec = Spec.parse(content["spec"])
    return spec.replace(outline=Outline.parse(content["outline"])) if "outline" in content else spec


def _check_header(header: Header, model: nn.Module, slices: Slices) -> None:
    """Raise ArtifactError where a file's tensors are not those of the model with these slices."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name in (*state, *(header.shapes.keys() - state.keys())):
        tensor, got, needed = state.get(name), "no such tensor", "no such tensor"
        if name in header.shapes:
            got = f"shape {header.shapes[name]} of type {header.dtypes[name]}"
        if tensor is not None:
            axes = slices.tensors.get(name, (None,) * tensor.dim())
            pairs = zip(tensor.shape, axes, strict=True)
            shape = tuple(n if runs is None else sum(length for _, length in runs) for n, runs in pairs)
            needed = f"shape {shape} and numbers like {tensor.dtype}"
            if header.shapes.get(name) == shape and is_kind(header.dtypes[name], tensor):
                continue
        raise ArtifactError.at(
            f"{header.path}: {name[:200]!r}",
            got=got,
            needed=f"{needed}, as config.json and the model say",
            remedy=_AS_BUILT,
        )


def _refuse_other_original(model: nn.Module, slices: Slices, spec: Spec) -> None:
    """Raise ArtifactError for an original that would become another model than the one that was saved."""
    if spec.outline is None:  # a folder of before outlines were drawn
        return
    slim = copy_to_meta(model)
    shrink_model(slim, slices)
    differences = [*spec.outline.list_differences(slim)]
    if differences:
        raise ArtifactError.at(
            "the model",
            got=f"another than the one that was saved ({join_changes(differences)})",
            needed="the same modules and settings",
            remedy=_AS_BUILT,
        )


def _refuse_changes(model: nn.Module, spec: Spec) -> None:
    """Raise ArtifactError where a model is another than the one that got the spec."""
    modules = dict(model.named_modules(remove_duplicate=False))
    written = spec.outline.written if spec.outline else ()
    for path, number in spec.attributes.items():
        value = read_attribute(model, modules, path)
        value = tuple(value) if isinstance(value, list) else value
        differs = isinstance(value, int | float | tuple) and value != number
        if value is None or (differs and path not in written):
            raise ArtifactError.at(
                path,
                got="no number that load() could find" if value is None else str(value),
                needed=f"{number}, as in the model that was extracted",
                remedy=_UNDO,
            )
    for name, tensor in model.state_dict().items():
        sizes = spec.sizes.get(name, (None,) * tensor.dim())
        lengths = [s if s is None or isinstance(s, int) else sum(n for _, n in s) for s in sizes]
        expected = tuple(n if s is None else s for s, n in zip(lengths, tensor.shape, strict=False))
        if len(sizes) != tensor.dim() or expected != tuple(tensor.shape):
            raise ArtifactError.at(
                name,
                got=f"shape {tuple(tensor.shape)}",
                needed=f"{lengths}, with any size for None, as in the model that was extracted",
                remedy=_UNDO,
            )
    changes = [*spec.outline.list_differences(model)] if spec.outline else []
    if changes:
        raise ArtifactError.at(
            "the model",
            got=f"changes since it was extracted or loaded ({join_changes(changes)})",
            needed="modules and settings as they were: load() makes them again of the original",
            remedy=_UNDO,
        )


def _prove_folder(draft: Path, spec: Spec, tensors: Mapping[str, Tensor]) -> None:
    """Read what was written, and compare it with what should have been."""
    read = load_file(draft / WEIGHTS)
    differing = [n for n, t in tensors.items() if not (n in read and torch.equal(read[n], t))]
    read_spec = _read_config(draft / CONFIG)
    if (read_spec, read_spec.outline) != (spec, spec.outline) or differing or len(read) != len(tensors):
        got = f"other content, in {differing[0] if differing else CONFIG}, when the folder was read again"
        raise ArtifactError.at(str(draft), got=got, needed="what was written", remedy="check the disk")
