"""Bind the numbers that multiply attention scores, and the sizes of heads, to the channels of the heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from timm_autoslim.tracing.describe import DESCRIBES_HEAD, Describer
from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.label_recorder import RunRecord
from timm_autoslim.tracing.labels import AttributeUse, Vector
from timm_autoslim.tracing.scales import Factor
from timm_autoslim.utils.tensors import find_tied_names


@dataclass(frozen=True)
class HeadBinder:
    """Binds the numbers that multiply attention scores in the runs of a trace.

    Attributes:
        copy: the meta copy that ran.
        flow: the state of the trace.
        records: the runs.
        numbers: the tensors of the model that stand for one number.
        attributes: paths of the attributes that the modules had before any run.
        read: paths of the attributes that reached a function of torch.
    """

    copy: nn.Module
    flow: Flow
    records: Sequence[RunRecord]
    numbers: Mapping[str, Factor]
    attributes: Set[str]
    read: Set[str]

    def bind(self, describer: Describer) -> None:
        """Bind these numbers, and the sizes of heads, which describe the modules, to the channels of the heads."""
        scales = list(self._list_scales())
        for path, vectors in self.flow.contracted_vectors.items():
            for name, value in self.copy.get_submodule(path).__dict__.items():
                for vector in vectors:
                    # tokens, which are frozen, may be as many as channels
                    if f"{path}.{name}" in self.attributes and not self.flow.is_frozen(vector):
                        self._bind_by_name(f"{path}.{name}" if path else name, name, value, vector, scales, describer)
        self.flow.constraints.attributes += scales

    def _list_scales(self) -> Iterator[AttributeUse]:
        """Yield the scales. One that comes from no attribute must follow by itself, which the proof finds out."""
        unsettable = {*find_tied_names(self.copy).values(), *dict(self.copy.named_parameters())}
        for scores in [scores for record in self.records for scores in record.scores]:
            assert scores.label is not None
            if self.flow.is_frozen(scores.label):
                continue
            if (empty := scores.find_empty()) is not None:
                reason = f"{empty.path}: it multiplies attention scores, and has no data that tell if it is a scale"
                self.flow.constraints.freeze(scores.label, reason)
            for factor, power in scores.find_scale().items():
                value = self._read_number(factor.path) if factor.path not in unsettable else None
                if factor.path is not None and value is not None:
                    yield AttributeUse(factor.path, value, scores.label, power / factor.power)

    def _read_number(self, path: str | None) -> float | None:
        """Return the number that an attribute or tensor of the model is."""
        if path is None:
            return None
        if path in self.numbers:
            return self.numbers[path].value
        module, _, name = path.rpartition(".")
        return float(self.copy.get_submodule(module).__dict__[name])

    def _bind_by_name(
        self,
        path: str,
        name: str,
        value: Any,
        vector: Vector,
        scales: list[AttributeUse],
        describer: Describer,
    ) -> None:
        """Bind the size of a head, its scale, or a scale that this forward does not read: fused attention has its own.

        Args:
            path, name, value: an attribute.
            vector: the channels of the head.
            scales: the scales that the forward reads; the one of this attribute is taken out.
            describer: it gets the size of a head.
        """
        if isinstance(value, int) and name in DESCRIBES_HEAD and value == len(vector):
            describer.uses.append(AttributeUse(path, int(value), vector))
        of_path = (use for use in scales if use.path == path and use.vector is not None)
        use = next((use for use in of_path if np.array_equal(use.vector, vector)), None)  # type: ignore[arg-type]
        unread = isinstance(value, float) and path not in self.read
        if use is not None:
            scales[:] = [other for other in scales if other is not use]
        elif unread and "scale" in name and value == len(vector) ** -0.5:
            use = AttributeUse(path, float(value), vector, -0.5)
        if use is not None:
            self.flow.constraints.attributes.append(use)
