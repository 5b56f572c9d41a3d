"""Fourier transforms along positions, as in the filters of GFNet: channels stay what they are."""

from __future__ import annotations

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.ops.schema import OperatorCall
from timm_autoslim.tracing.ops.table import RULES


@RULES.add("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _transform(flow: Flow, op: OperatorCall) -> None:
    labels = flow.get_labels(op["self"])
    for dim in op["dim"]:
        flow.freeze_label(labels[dim], "a Fourier transform treats this dimension as positions, not channels")
        labels[dim] = None
    flow.set_labels(op.out, labels)


@RULES.add("_conj", "_conj_physical", "angle")
def _part(flow: Flow, op: OperatorCall) -> None:
    flow.set_labels(op.out, flow.get_labels(op["self"]))
