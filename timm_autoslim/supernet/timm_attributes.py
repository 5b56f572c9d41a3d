"""What timm's optimizers ask a model for, as it is of a supernet, whose parameters are called `model.NAME`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

PREFIX = "model."


def _prefix_no_weight_decay(model: Any) -> Callable[[], set[str]]:
    """Patterns of the names of parameters that no weight decay is for."""
    names = model.no_weight_decay
    return lambda: {PREFIX + name for name in names()}


def _prefix_group_matcher(model: Any) -> Callable[..., Callable[[str], float]]:
    """A function that returns what tells the layer of a parameter or module from its name."""
    make_matcher = model.group_matcher

    def group_matcher(*args: Any, **kwargs: Any) -> Callable[[str], float]:
        from timm.models import group_modules, group_parameters

        # matched without the prefix, because the matcher's expressions begin at the start of a name
        matcher = make_matcher(*args, **kwargs)
        layers = group_parameters(model, matcher, reverse=True) | group_modules(model, matcher, reverse=True)
        return lambda name: layers.get(name.removeprefix(PREFIX), math.inf)

    return group_matcher


def _prefix_pretrained_cfg(model: Any) -> Any:
    """The model's configuration; timm groups the layers of a model without a matcher by the name of its classifier."""
    if not isinstance(model.pretrained_cfg, Mapping):
        return model.pretrained_cfg
    config = dict(model.pretrained_cfg)
    classifier = config.get("classifier")
    if isinstance(classifier, str) and classifier:
        config["classifier"] = PREFIX + classifier
    elif isinstance(classifier, (list, tuple)):
        config["classifier"] = tuple(PREFIX + name for name in classifier)
    return config


TIMM_ATTRIBUTES: dict[str, Callable[[nn.Module], Any]] = {
    "no_weight_decay": _prefix_no_weight_decay,
    "group_matcher": _prefix_group_matcher,
    "pretrained_cfg": _prefix_pretrained_cfg,
}
"""Attributes by name; each takes the model, and returns that of its supernet; AttributeError if the model has none.

With them `timm.optim.create_optimizer_v2(supernet, ...)` makes the same groups as of the model: each parameter has the
same weight decay, and with `layer_decay=` the same rate.
"""
