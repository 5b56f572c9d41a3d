"""Tensors that are data: tables that no module computes, and buffers that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.slicing.slices import Slices, extract_model
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.labels import Constraints, Label


def constrain_unsaved(
    model: nn.Module, labels: Mapping[str, list[Label]], names: Set[str], constraints: Constraints
) -> None:
    """Freeze tensors that no checkpoint holds if their module may compute them again; else keep their order.

    A module that overrides `_apply` computes them again when it is cast or moved (rotary tables).
    """
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        recomputes = type(module)._apply is not nn.Module._apply
        for label in labels[name]:
            if recomputes:
                constraints.freeze(label, f"no checkpoint holds {name}, and its module may compute it again")
            elif label is not None:
                constraints.ordered_vectors.append(label)


def freeze_tables(graph: ChannelGraph, labels: Mapping[str, list[Label]]) -> ChannelGraph:
    """Freeze the columns of tables that no module computes, such as coordinates: they are data, as inputs are."""
    produced_groups = {strand.group for strand in graph.strands if strand.producers}
    strands = {index for index, strand in enumerate(graph.strands) if strand.group not in produced_groups}
    columns = [
        label
        for name in labels.keys() - set(graph.parameters)
        for axis, label in enumerate(labels[name])
        if label is not None and not strands.isdisjoint(graph.places[name, axis].strand.tolist())
    ]
    return graph.freeze(columns, "the columns of a table that no module computes") if columns else graph


def freeze_refilled(
    graph: ChannelGraph, model: nn.Module, labels: Mapping[str, list[Label]], names: Set[str]
) -> ChannelGraph:
    """Freeze buffers that no checkpoint holds, if their module would fill narrower ones with other numbers.

    Args:
        graph: the channel graph.
        model: the model, with data.
        labels: one label for each axis of every tensor, by name.
        names: the tensors that no checkpoint holds.
    """
    narrow = names & {name for name, _ in graph.lengths}
    if not narrow:
        return graph
    slices = graph.slices(graph.half_widths)
    differing: dict[type, set[str]] = {}  # by class, as many modules may be of one
    for name in sorted(narrow):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if type(module) not in differing:
            differing[type(module)] = _find_refilled(module, slices.within(path) if path else slices)
        if leaf in differing[type(module)]:
            graph = graph.freeze(labels[name], f"{name}: init_non_persistent_buffers computes it again")
    return graph


def _find_refilled(module: nn.Module, slices: Slices) -> set[str]:
    """Return the buffers that timm's `init_non_persistent_buffers` of a narrower module fills with other numbers.

    timm calls it after a model was built on the meta device. Zeros and indexes, for example, are the same as the wide
    buffer's slice. Without data only shapes are compared.

    Args:
        module: a module of the model.
        slices: what a subnet keeps of it.
    """
    if not hasattr(module, "init_non_persistent_buffers"):
        return set()
    narrow: Any = extract_model(module, slices)
    before = {name: buffer.clone() for name, buffer in narrow.named_buffers(recurse=False)}
    try:
        with torch.no_grad():
            narrow.init_non_persistent_buffers()
    except Exception:  # whatever a method raises that knows the wide sizes alone
        return set(before)
    after = dict(narrow.named_buffers(recurse=False))
    return {name for name, buffer in before.items() if not _is_same(buffer, after.get(name))}


def _is_same(buffer: Tensor, other: Tensor | None) -> bool:
    if other is None or buffer.shape != other.shape:
        return False
    return buffer.is_meta or torch.equal(buffer, other)
