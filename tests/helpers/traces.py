"""Trace the same model once: most tests convert one of a few small networks, to test something else.

Models are told apart by their attributes and classes, so this is not for tests that patch the code of a class.
"""

import io
import pickle

from torch import Tensor

from timm_autoslim.tracing.trace import trace_model

_TRACES = {}


class _Outline(pickle.Pickler):
    """Pickles all that a model and its example are, but the numbers in their tensors: tracing reads none of these."""

    def __init__(self, file):
        super().__init__(file)
        self.order = {}  # of the tensors, so that tied ones are told

    def persistent_id(self, value):
        if not isinstance(value, Tensor):
            return None
        layout = tuple(value.shape), value.stride(), str(value.dtype), str(value.device), value.requires_grad
        return type(value), self.order.setdefault(id(value), len(self.order)), layout


def _outline(*values):
    """Return the outline as bytes, or None where something cannot be pickled, such as a parametrised module."""
    file = io.BytesIO()
    try:
        _Outline(file).dump(values)
    except (pickle.PicklingError, AttributeError, RuntimeError, TypeError):
        return None
    return file.getvalue()


def trace_once(*args):
    """Do as `trace_model`, and return the earlier trace (a value, which nobody changes) of a model of this outline."""
    key = _outline(*args)
    if key is None:
        return trace_model(*args)
    if key not in _TRACES:
        _TRACES[key] = trace_model(*args)
    return _TRACES[key]
