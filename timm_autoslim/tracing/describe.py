"""Find the attributes that describe modules: their forward does not read them, but users and timm do."""

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

# Names of attributes that hold the number of channels of a module's input, its output, or its attention heads.
_DESCRIBES_INPUT = ("in_channels", "in_features", "in_chs", "in_dim", "num_features", "embed_dim", "kdim", "vdim",
                   "input_size")  # fmt: skip
_DESCRIBES_OUTPUT = ("out_channels", "out_features", "out_chs", "out_dim", "num_features", "num_channels")
DESCRIBES_HEAD = ("head_dim", "key_dim", "dim_head")


class Describer:
    """Collects the attributes that describe modules while a trace runs.

    Attributes:
        uses: these attributes, each with the channels that it counts.
        inputs: by module, the labels of its first input tensor.
        outputs: by module, the labels of all tensors that it returned last.
    """

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        """Describe `model`, the meta copy that the trace runs."""
        self.flow, self.model = flow, model
        self.uses: list[AttributeUse] = []
        self._features: Any = None  # what `forward_features` returned
        self.outputs: dict[str, list[Label]] = {}
        self.inputs: dict[str, list[Label]] = {}
        # by module, the labels of what it returned first in this run
        self._returns: dict[str, tuple[tuple[Label, ...], ...]] = {}

    def start(self) -> None:
        """Start another run."""
        self._returns.clear()

    def enter(self, path: str, module: nn.Module, labels: list[Label]) -> None:
        """Note the attributes that describe the input of a module; `labels` are those of its first tensor."""
        self.inputs[path] = labels
        self._note_all(path, module, _DESCRIBES_INPUT, labels)

    def leave(self, path: str, module: nn.Module, labels: tuple[tuple[Label, ...], ...]) -> None:
        """Note the attributes that describe the output of a module; `labels` are those of every tensor in it."""
        self._returns.setdefault(path, labels)
        self.outputs[path] = [label for tensor in labels for label in tensor]
        if labels:
            self._note_all(path, module, _DESCRIBES_OUTPUT, labels[0])

    def _note_all(self, path: str, module: nn.Module, names: Sequence[str], labels: Sequence[Label]) -> None:
        if not path:  # `describe_model` does this for the model itself
            return
        for name in names:
            value = module.__dict__.get(name)
            if isinstance(value, int):
                self.note(f"{path}.{name}", int(value), labels)

    def note(self, path: str, value: int, labels: Sequence[Label]) -> bool:
        """Bind this attribute to the first of these dimensions that has this length; return whether there is one."""
        match = [v for v in labels if v is not None and len(v) == value]
        if match:
            self.uses.append(AttributeUse(path, value, match[0]))
        return bool(match)

    def watch_features(self) -> None:
        """Keep what `forward_features` returns; as a method it has no hooks."""
        method: Any = getattr(self.model, "forward_features", None)
        if not callable(method):
            return

        def forward_features(*args: Any, **kwargs: Any) -> Any:
            self._features = method(*args, **kwargs)
            return self._features

        self.model.__dict__["forward_features"] = forward_features

    # -- attributes of timm's models --------------------------------------------------------------------------------

    def describe_model(self, example: Any) -> None:
        """Note the attributes of timm's models: num_features, head_hidden_size, embed_dim, and those of feature_info.

        In some models `embed_dim` is `num_features`; in others it has one number for each stage.
        """
        lists: set[int] = set()  # ids of those that are described already
        for path, module in self.model.named_modules():  # an encoder in a model has its own list, or shares the model's
            feature_info: Any = getattr(module, "feature_info", None)
            is_backbone = isinstance(feature_info, FeatureInfo)  # which holds the list
            name, infos = ("feature_info.info", feature_info.info) if is_backbone else ("feature_info", feature_info)
            if hasattr(infos, "__getitem__") and id(infos) not in lists:
                labels = [self._find_tap(path, info) for info in infos]
                if is_backbone:
                    labels = self._find_maps(path, feature_info, labels)
                elif not path and not all(labels):  # it names modules that do not exist
                    maps = self._run_intermediates(example, len(labels))
                    labels = [tap or other for tap, other in zip(labels, maps, strict=True)]
                if self._describe_features(path, name, infos, labels):
                    lists.add(id(infos))
        self._describe_widths(example)

    def _describe_widths(self, example: Any) -> None:
        """Note num_features, head_hidden_size, out_features and embed_dim."""
        forward: Any = getattr(self.model, "forward_features", None)
        if callable(forward) and self._features is None:
            run_model(forward, example)
        features = collect_tensors(self._features)
        attributes: Mapping[str, Any] = self.model.__dict__
        if isinstance(out := attributes.get("out_features"), int):  # of an encoder that projects its features
            self.note("out_features", out, self.outputs[""])
        width, hidden, dims = (attributes.get(n) for n in ("num_features", "head_hidden_size", "embed_dim"))
        names = [n for n in ("num_features", "embed_dim") if isinstance(width, int) and attributes.get(n) == width]
        matches = [self.note(n, int(attributes[n]), self.flow.get_labels(features[0])) for n in names if features]
        if isinstance(dims, list | tuple) and len(dims) == len(features):  # of several branches
            for i, (n, tensor) in enumerate(zip(dims, features, strict=True)):
                self.note(f"embed_dim.{i}", int(n), self.flow.get_labels(tensor))
        if not features or not isinstance(hidden, int):
            return
        pooled = self._run_pooling()
        self.note("head_hidden_size", int(hidden), pooled)
        if not any(matches):  # the features are of several stages, and the head reads all of them together
            for name in names:
                self.note(name, int(attributes[name]), pooled)

    def _run_pooling(self) -> list[Label]:
        """Return the labels of what the last layer of the head reads, such as pooled features (N, C)."""
        forward_head: Any = self.model.forward_head
        try:
            return self.flow.get_labels(forward_head(self._features, pre_logits=True))
        except NotImplementedError:  # an encoder, which has no head: a head would read its output
            return self.outputs[""]

    def _find_tap(self, path: str, info: Any) -> list[Label]:
        """Return the labels of the channels that one item of the `feature_info` of the module `path` describes."""
        if not isinstance(info, dict) or not info.get("module"):
            return []
        tensors = self.inputs if info.get("hook_type") == "forward_pre" else self.outputs
        labels = tensors.get(f"{path}.{info['module']}" if path else info["module"], [])
        return [v for v in labels if v is not None and len(v) == info.get("num_chs")]

    def _find_maps(self, path: str, info: FeatureInfo, labels: list[list[Label]]) -> list[list[Label]]:
        """Return the labels of each feature map of a backbone: of those that it returns, else those in `labels`."""
        maps = self._returns.get(path, ())
        labels = list(labels)
        if len(maps) == len(info.out_indices):
            for index, dimensions in zip(info.out_indices, maps, strict=True):
                labels[index] = list(dimensions)
        return labels

    def _run_intermediates(self, example: Any, count: int) -> list[list[Label]]:
        """Return the labels of the channels of this many maps (N, C, H, W) of `forward_intermediates`."""
        with contextlib.suppress(Exception):  # not every model has the method, and not every example fits it
            forward_intermediates: Any = self.model.forward_intermediates
            maps = forward_intermediates(example, intermediates_only=True)
            if len(maps) == count:
                return [self.flow.get_labels(tensor)[1:2] for tensor in maps]
        return [[]] * count

    def _describe_features(self, path: str, name: str, infos: Iterable[Any], labels: Sequence[list[Label]]) -> bool:
        """Note the channels in the `feature_info` list at `name`; return whether there are any."""
        prefix = f"{path}." if path else ""
        numbers = [int(info["num_chs"]) if isinstance(info, dict) and "num_chs" in info else 0 for info in infos]
        matches = [self.note(f"{prefix}{name}.{i}.num_chs", n, labels[i]) for i, n in enumerate(numbers) if n]
        dims = (self.model.get_submodule(path) if path else self.model).__dict__.get("embed_dim")
        if isinstance(dims, list | tuple) and list(dims) == numbers:
            for i, n in enumerate(numbers):
                self.note(f"{prefix}embed_dim.{i}", n, labels[i])
        return any(matches)
