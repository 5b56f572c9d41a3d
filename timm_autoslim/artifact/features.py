"""What `features_only=True` makes of a slim model: the kind of backbone that timm makes of its base."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet
from torch import nn

from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError

# timm's words for its extractors that build a new model from the modules of another
EXTRACTORS = {FeatureListNet: "list", FeatureDictNet: "dict", FeatureHookNet: "hook"}


class _Getter(FeatureGetterNet):  # type: ignore[misc]  # timm is untyped here
    """timm's extractor by `forward_intermediates`, with checkpointing, as backbone classes of some bases have it."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward instead of keeping their activations."""
        inner: Any = self.model
        inner.set_grad_checkpointing(enable)


def choose_feature_cfg(model: nn.Module, spec: Spec) -> dict[str, Any]:
    """Return how timm takes features from a model: by the base's default indices, and in its way where that works.

    Args:
        model: a slim model with its head.
        spec: its spec.

    Returns:
        What timm's `build_model_with_cfg` takes as `feature_cfg`.

    Raises:
        ArtifactError: the base has no `feature_info`.
    """
    info: Any = getattr(model, "feature_info", None)
    if not info:
        raise ArtifactError.at(
            "features_only=True",
            got=f"base {spec.base!r}, which has no feature_info",
            needed="a base that has",
            remedy="use forward hooks instead",
        )
    if spec.from_torchvision:
        return {"feature_cls": "fx", "out_indices": tuple(range(len(info)))}
    backbone: Any = None
    for device in ("meta", "cpu"):  # some bases cannot be built on the meta device
        try:
            with torch.device(device):
                backbone = timm.create_model(spec.require_base(), features_only=True, **spec.copy_arguments())
            break
        except Exception:  # some bases have no extractor of their own
            continue
    indices = tuple(range(len(info)) if backbone is None else backbone.feature_info.out_indices)
    if kind := EXTRACTORS.get(type(backbone)):
        intact = set(backbone) == {"body"}  # it holds the model as it is, or else its children, or their children
        flat = not intact and not set(backbone) <= {name for name, _ in model.named_children()}
        rewriting = {"no_rewrite": intact} if kind == "hook" else {}
        return {"feature_cls": kind, "out_indices": indices, "flatten_sequential": flat, **rewriting}
    if hasattr(model, "forward_intermediates"):
        return {"feature_cls": _Getter, "out_indices": indices, "output_fmt": "NCHW"}
    return {"feature_cls": "hook", "out_indices": indices}
