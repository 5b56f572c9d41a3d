"""The attributes that describe modules without being read in their forward: users and timm read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm.models import FeatureInfo
from torch import nn

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.labels import AttributeUse, Label
from timm_autoslim.utils.meta import run_model
from timm_autoslim.utils.tensors import collect_tensors

# Attributes that only describe a module: they are not read in forward, but users and timm read them.
_DESCRIBES_INPUT = ("in_channels", "in_features", "in_chs", "in_dim", "num_features", "embed_dim", "kdim", "vdim",
                   "input_size")  # fmt: skip
_DESCRIBES_OUTPUT = ("out_channels", "out_features", "out_chs", "out_dim", "num_features", "num_channels")
DESCRIBES_HEAD = ("head_dim", "key_dim", "dim_head")


class Describer:
    """Notes the attributes that describe modules without being read in forward, while a trace runs.

    Attributes:
        uses: these attributes, each with the channels that it counts.
    """

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        """Describe `model`, the meta copy that the trace runs."""
        self.flow, self.model = flow, model
        self.uses: list[AttributeUse] = []
        self._features: Any = None  # what forward_features returned
        self._outputs: dict[str, list[Label]] = {}  # by module, the labels of all tensors that left it last
        self._inputs: dict[str, list[Label]] = {}  # by module, the labels of the first tensor that entered it
        self._returns: dict[str, tuple[tuple[Label, ...], ...]] = {}  # by module, what it returned first in this run

    def start(self) -> None:
        """Begin another run."""
        self._returns.clear()

    def enter(self, path: str, module: nn.Module, labels: list[Label]) -> None:
        """Note what describes the input of a module; `labels` are those of its first tensor."""
        self._inputs[path] = labels
        self._note_all(path, module, _DESCRIBES_INPUT, labels)

    def leave(self, path: str, module: nn.Module, labels: tuple[tuple[Label, ...], ...]) -> None:
        """Note what describes the output of a module; `labels` are those of every tensor that it returned."""
        self._returns.setdefault(path, labels)
        self._outputs[path] = [label for tensor in labels for label in tensor]
        if labels:
            self._note_all(path, module, _DESCRIBES_OUTPUT, labels[0])

    def _note_all(self, path: str, module: nn.Module, names: Sequence[str], labels: Sequence[Label]) -> None:
        if not path:  # what describes the model itself is read from its own methods, below
            return
        for name in names:
            value = module.__dict__.get(name)
            if isinstance(value, int):
                self.note(f"{path}.{name}", int(value), labels)

    def note(self, path: str, value: int, labels: Sequence[Label]) -> bool:
        """Note that this attribute is the length of one of these dimensions; return whether one is of that length."""
        match = [v for v in labels if v is not None and len(v) == value]
        if match:
            self.uses.append(AttributeUse(path, value, match[0]))
        return bool(match)

    def listen(self) -> None:
        """Keep what leaves `forward_features`, which is a method and not a module."""
        method: Any = getattr(self.model, "forward_features", None)
        if not callable(method):
            return

        def forward_features(*args: Any, **kwargs: Any) -> Any:
            self._features = method(*args, **kwargs)
            return self._features

        self.model.__dict__["forward_features"] = forward_features

    # -- what timm promises of a model ------------------------------------------------------------------------------

    def describe_model(self, example: Any) -> None:
        """Note what timm promises about a model: num_features, head_hidden_size, and the channels in feature_info.

        Some models make a new head by `embed_dim`, which then is their `num_features`, or one number for each stage.
        """
        described: set[int] = set()
        for path, module in self.model.named_modules():  # an encoder within a model may have its own, or share the list
            told: Any = getattr(module, "feature_info", None)
            backbone = isinstance(told, FeatureInfo)  # which holds the list
            name, infos = ("feature_info.info", told.info) if backbone else ("feature_info", told)
            if hasattr(infos, "__getitem__") and id(infos) not in described:
                labels = [self._tapped(path, info) for info in infos]
                if backbone:
                    labels = self._returned(path, told, labels)
                elif not path and not all(labels):  # it names modules that there are not
                    maps = self._intermediates(example, len(labels))
                    labels = [seen or other for seen, other in zip(labels, maps, strict=True)]
                if self._describe_features(path, name, infos, labels):
                    described.add(id(infos))
        self._describe_width(example)

    def _describe_width(self, example: Any) -> None:
        """Note num_features and head_hidden_size."""
        forward: Any = getattr(self.model, "forward_features", None)
        if callable(forward) and self._features is None:
            run_model(forward, example)
        found = collect_tensors(self._features)
        named: Mapping[str, Any] = self.model.__dict__
        if isinstance(out := named.get("out_features"), int):  # of an encoder that projects its features
            self.note("out_features", out, self._outputs[""])
        width, hidden = named.get("num_features"), named.get("head_hidden_size")
        alike = [name for name in ("num_features", "embed_dim") if isinstance(width, int) and named.get(name) == width]
        seen = [self.note(name, int(named[name]), self.flow.labels(found[0])) for name in alike if found]
        dims = named.get("embed_dim")
        if isinstance(dims, list | tuple) and len(dims) == len(found):  # of several branches
            for i, (n, tensor) in enumerate(zip(dims, found, strict=True)):
                self.note(f"embed_dim.{i}", int(n), self.flow.labels(tensor))
        if not found or not isinstance(hidden, int):
            return
        forward_head: Any = self.model.forward_head
        try:
            pooled = self.flow.labels(forward_head(self._features, pre_logits=True))
        except NotImplementedError:  # an encoder, which has no head: its output is what one would read
            pooled = self._outputs[""]
        self.note("head_hidden_size", int(hidden), pooled)
        if not any(seen):  # the features are of several stages, and a head reads all of them at once
            for name in alike:
                self.note(name, int(named[name]), pooled)

    def _tapped(self, path: str, info: Any) -> list[Label]:
        """The labels of the channels that an item of the `feature_info` of the module `path` tells of."""
        if not isinstance(info, dict) or not info.get("module"):
            return []
        seen = self._inputs if info.get("hook_type") == "forward_pre" else self._outputs
        labels = seen.get(f"{path}.{info['module']}" if path else info["module"], [])
        return [v for v in labels if v is not None and len(v) == info.get("num_chs")]

    def _returned(self, path: str, info: FeatureInfo, labels: list[list[Label]]) -> list[list[Label]]:
        """The labels of the channels of each map of a backbone: as it returns them, or else those of `labels`."""
        maps = self._returns.get(path, ())
        found = list(labels)
        if len(maps) == len(info.out_indices):
            for index, dimensions in zip(info.out_indices, maps, strict=True):
                found[index] = list(dimensions)
        return found

    def _intermediates(self, example: Any, count: int) -> list[list[Label]]:
        """The labels of the channels of this many maps from `forward_intermediates`, (N, C, H, W) each."""
        with contextlib.suppress(Exception):  # not every model has it, nor for every example
            tap: Any = self.model.forward_intermediates
            maps = tap(example, intermediates_only=True)
            if len(maps) == count:
                return [self.flow.labels(tensor)[1:2] for tensor in maps]
        return [[]] * count

    def _describe_features(self, path: str, name: str, infos: Iterable[Any], labels: Sequence[list[Label]]) -> bool:
        """Note the channels in the `feature_info` that is kept under `name`; return whether there were any."""
        prefix = f"{path}." if path else ""
        numbers = [int(info["num_chs"]) if isinstance(info, dict) and "num_chs" in info else 0 for info in infos]
        noted = [self.note(f"{prefix}{name}.{i}.num_chs", n, labels[i]) for i, n in enumerate(numbers) if n]
        dims = (self.model.get_submodule(path) if path else self.model).__dict__.get("embed_dim")
        if isinstance(dims, list | tuple) and list(dims) == numbers:
            for i, n in enumerate(numbers):
                self.note(f"{prefix}embed_dim.{i}", n, labels[i])
        return any(noted)
