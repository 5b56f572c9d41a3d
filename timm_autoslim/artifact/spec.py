"""The spec of a slimmed model: how it differs from its base, as plain data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from timm_autoslim.artifact.limits import MAX_ITEMS, check_plain, copy_plain, fail
from timm_autoslim.utils.arguments import is_int

FORMAT = 1
RECIPE_KEYS = ("format", "base", "base_args", "sizes", "attributes", "widths")
# A recipe may come from a stranger: it may say how the base is built, never where weights or settings come from.
FORBIDDEN_ARGS = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path"),
        *("cache_dir", "weights", "progress", "recipe", "device", "dtype"),
        *("features_only", "out_indices", "feature_cls", "feature_cfg"),
    )
)


def check_recipe(recipe: object) -> dict[str, Any]:
    """Check a recipe as far as that goes without its base, and return a copy of it.

    Args:
        recipe: plain data, as `model.autoslim` or the `model_args` of an exported config.json hold it.

    Raises:
        ArtifactError: an unknown format or key, a value of the wrong type, or base_args that would load something.
    """
    if not isinstance(recipe, Mapping) or set(recipe) != set(RECIPE_KEYS):
        got = sorted(map(str, recipe)) if isinstance(recipe, Mapping) else recipe
        raise fail("keys", got, f"a mapping with exactly {', '.join(RECIPE_KEYS)}")
    if not is_int(recipe["format"]) or recipe["format"] != FORMAT:
        raise fail("format", recipe["format"], f"{FORMAT} (a newer one needs a newer timm-autoslim)")
    if recipe["base"] is not None and not (isinstance(recipe["base"], str) and len(recipe["base"]) <= MAX_ITEMS):
        raise fail("base", recipe["base"], "a name, or None")
    for part in ("base_args", "sizes", "attributes", "widths"):
        if not isinstance(recipe[part], Mapping) or not all(isinstance(key, str) for key in recipe[part]):
            raise fail(part, recipe[part], "a mapping from names")
    for name, size in recipe["widths"].items():
        if not is_int(size) or size < 1:
            raise fail(f"widths.{name}", size, "a positive integer")
    refused = sorted(FORBIDDEN_ARGS & set(recipe["base_args"]))
    if refused:
        raise fail(f"base_args.{refused[0]}", recipe["base_args"][refused[0]], "only arguments that shape the base")
    check_plain("base_args", recipe["base_args"])
    return {key: copy_plain(key, value) for key, value in recipe.items()}


def built_with(model: nn.Module) -> dict[str, Any]:
    """The arguments that timm says it built a model with (since 1.0.31), as far as a recipe can hold them."""
    known = getattr(model, "_model_args", None)
    held: dict[str, Any] = {}
    for key, value in known.items() if isinstance(known, Mapping) else ():
        if value is None or key in FORBIDDEN_ARGS or key == "taps":  # which a slimmed model has beside its base's own
            continue
        with contextlib.suppress(TypeError, ValueError):  # classes and functions: an export says so where they matter
            check_plain(key, value)
            held[key] = json.loads(json.dumps(value, allow_nan=False))  # tuples become lists
    return held
