"""Do once what many tests do alike, to test something else: create a model, trace it, count and draw for its card."""

import copy
import functools
import io
import pickle

import timm
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from timm_autoslim.artifact.card import count_costs, draw_channels
from timm_autoslim.tracing.trace import trace_model

_create_model = timm.create_model
_MODELS, _LIMIT = {}, 12  # by name, arguments and random numbers: the model, and the random numbers after it
_TRACES, _COSTS = {}, {}

draw_once = functools.cache(draw_channels)  # bytes, from integers


def create_once(model_name, **arguments):
    """Do as `timm.create_model`, with a copy of an earlier model where all that it is made from is the same."""
    elsewhere = _get_current_function_mode_stack()  # on the meta device, for one
    if model_name not in ("resnet10t", "test_vit") or elsewhere or " at 0x" in repr(arguments):
        return _create_model(model_name, **arguments)
    key = model_name, repr(arguments), torch.get_default_dtype(), torch.get_rng_state().numpy().tobytes()
    if key not in _MODELS:
        model = _create_model(model_name, **arguments)
        if len(_MODELS) == _LIMIT:
            del _MODELS[next(iter(_MODELS))]
        _MODELS[key] = model, torch.get_rng_state()
    model, state = _MODELS[key] = _MODELS.pop(key)  # now the last to be forgotten
    torch.set_rng_state(state)
    return copy.deepcopy(model)


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
    """Do as `trace_model`, and return the earlier trace (a value, which nobody changes) of a model of this outline.

    Models are told apart by their attributes and classes, so this is not for tests that patch the code of a class.
    """
    key = _outline(*args)
    if key is None:
        return trace_model(*args)
    if key not in _TRACES:
        _TRACES[key] = trace_model(*args)
    return _TRACES[key]


def count_once(*args):
    """Do as `count_costs`, and return the earlier costs of a model of this outline."""
    key = _outline(*args)
    if key is None:
        return count_costs(*args)
    if key not in _COSTS:
        _COSTS[key] = count_costs(*args)
    return dict(_COSTS[key])
