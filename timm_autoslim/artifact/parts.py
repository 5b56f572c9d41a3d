"""The parts of a model that are models of timm or torchvision themselves: each gets a spec of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torchvision
from timm.models import FeatureInfo
from torch import nn

from timm_autoslim.artifact.outline import Outline
from timm_autoslim.artifact.preparation import write_input_size
from timm_autoslim.artifact.spec import Spec, derive_spec
from timm_autoslim.slicing.slices import Slices, cut_prefix


def list_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts, by path: timm's have a `pretrained_cfg`, torchvision's are of one of its model classes."""
    for path, module in model.named_modules():
        kind = type(module)
        named = isinstance(getattr(module, "pretrained_cfg", None), Mapping)
        if path and (named or getattr(torchvision.models, kind.__name__, None) is kind):
            yield path, module


def describe_parts(
    model: nn.Module,
    slices: Slices,
    widths: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]] | None = None,
    written: Collection[str] = (),
) -> None:
    """Give every part a spec as `autoslim` attribute, so that `export(model.body, folder)` works.

    Args:
        model: a slim model.
        slices: what it keeps of its original.
        widths: the width of each channel group.
        shapes: by path, the shape (N, C, H, W) of a part's images, which its `pretrained_cfg` then says.
        written: paths of attributes that the model's own forward changes.
    """
    for path, part in list_parts(model):
        saved, of_part = set(part.state_dict()), cut_prefix(widths, f"{path}.")
        within = slices.within(path)
        written_in_part = cut_prefix(dict.fromkeys(written), f"{path}.")
        outline = Outline.draw(part, within.tensors, within.attributes, written_in_part)
        spec = derive_spec(part).narrow(within, saved, of_part, outline)
        part.autoslim = spec  # type: ignore[assignment]
        shape = (shapes or {}).get(path, ())
        if len(shape) == 4 and isinstance(getattr(part, "pretrained_cfg", None), Mapping):
            write_input_size(part, shape[1:])


def advise(model: nn.Module) -> str:
    """Say which parts of a model can be exported, and how the model itself is written, which no name creates."""
    calls = []
    for path, part in list_parts(model):
        spec: Any = getattr(part, "autoslim", None)
        if isinstance(spec, Spec) and not isinstance(getattr(part, "feature_info", None), FeatureInfo):
            place = f"model.{path}" if path.isidentifier() else f"model.get_submodule({path!r})"
            calls.append(f"export({place}, folder{', base=...' if spec.base is None else ''})")
    rest = "timm_autoslim.save(model, folder) writes a model of any class"
    return f"{' or '.join(calls[:3])} exports a part; {rest}" if calls else rest
