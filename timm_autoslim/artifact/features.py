"""What `features_only=True` makes of a slimmed model: the kind of backbone that timm makes of its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet
from torch import nn

from timm_autoslim.artifact.construct import TORCHVISION
from timm_autoslim.errors import ArtifactError

# timm's words for its extractors that rebuild a model of its modules
EXTRACTORS = {FeatureListNet: "list", FeatureDictNet: "dict", FeatureHookNet: "hook"}


class _Getter(FeatureGetterNet):  # type: ignore[misc]  # timm is untyped here
    """timm's extractor that asks the model itself, for bases with a backbone class of their own, which can do this."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward instead of keeping what they gave."""
        owner: Any = self.model
        owner.set_grad_checkpointing(enable)


def feature_cfg(model: nn.Module, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """How timm taps features of a model: by the base's own indices, and in its way where a slimmed model can.

    Args:
        model: a slimmed model, whole.
        recipe: its recipe, checked.

    Returns:
        What timm's `build_model_with_cfg` takes as `feature_cfg`.

    Raises:
        ArtifactError: the base has no `feature_info`.
    """
    base = recipe["base"]
    info: Any = getattr(model, "feature_info", None)
    if not info:
        raise ArtifactError(f"features_only=True: base {base!r} has no feature_info; use forward hooks instead")
    if base.startswith(TORCHVISION):
        return {"feature_cls": "fx", "out_indices": tuple(range(len(info)))}
    probe: Any = None
    for device in ("meta", "cpu"):  # some bases cannot stand on the meta device
        try:
            with torch.device(device):
                probe = timm.create_model(base, features_only=True, **recipe["base_args"])
            break
        except Exception:  # some bases have no extractor of their own
            continue
    indices = tuple(range(len(info)) if probe is None else probe.feature_info.out_indices)
    if kind := EXTRACTORS.get(type(probe)):
        whole = set(probe) == {"body"}  # the model as it is, else its children, or theirs
        flat = not whole and not set(probe) <= {name for name, _ in model.named_children()}
        rewritten = {"no_rewrite": whole} if kind == "hook" else {}
        return {"feature_cls": kind, "out_indices": indices, "flatten_sequential": flat, **rewritten}
    if hasattr(model, "forward_intermediates"):
        return {"feature_cls": _Getter, "out_indices": indices, "output_fmt": "NCHW"}
    return {"feature_cls": "hook", "out_indices": indices}
