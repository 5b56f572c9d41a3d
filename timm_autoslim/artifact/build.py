"""Spec -> slim model: the base is built within a limit of memory, the spec applied, and the head fitted."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timm_autoslim.artifact.apply import apply_common, apply_spec
from timm_autoslim.artifact.bases import build_on_meta, call_base, construct_base, find_weight_filter, get_base_settings
from timm_autoslim.artifact.config import refuse_forbidden
from timm_autoslim.artifact.limits import MemoryLimit
from timm_autoslim.artifact.preparation import write_input_size
from timm_autoslim.artifact.spec import Spec, make_spec_error
from timm_autoslim.artifact.torchvision import describe_features, remove_classifiers
from timm_autoslim.errors import ArtifactError
from timm_autoslim.utils.arguments import is_int


def build_slim(spec: Spec, /, **arguments: Any) -> nn.Module:
    """Create a spec's base, apply the spec and fit the head: the structure that an exported folder describes.

    Args:
        spec: a spec with a base.
        **arguments: as for `SlimBuilder.build`.

    Raises:
        ArtifactError: the spec has no base, or does not fit what its base builds.
    """
    return SlimBuilder(spec, MemoryLimit(spec.require_base())).build(arguments)


@dataclass(frozen=True)
class SlimBuilder:
    """Builds a slim model from its spec, within a limit of memory.

    Attributes:
        spec: a spec with a base.
        limit: how much may be allocated.
        taps: where a torchvision model's features are; None to measure them.
    """

    spec: Spec
    limit: MemoryLimit
    taps: Sequence[Sequence[Any]] | None = None

    def build(self, arguments: Mapping[str, Any], *, unfilled: bool = False) -> nn.Module:
        """Create the base, apply the spec and fit the head.

        Args:
            arguments: `num_classes`, the size of the head, 0 for none, the base's when None; `global_pool`, timm's
                pooling before the head, the base's when None; and further arguments of the base's constructor, which
                take precedence over the spec's.
            unfilled: leave parameters uninitialized where they would be filled with random numbers.

        Raises:
            ArtifactError: the spec does not fit what its base builds, or the base cannot take the arguments.
        """
        args = dict(arguments)
        num_classes, global_pool = args.pop("num_classes", None), args.pop("global_pool", None)
        refuse_forbidden(args)
        native = self._find_native_classes()
        classes = native if num_classes is None else num_classes
        if not is_int(classes) or classes < 0:
            raise ArtifactError.at("num_classes", got=reprlib.repr(classes), needed="an integer, 0 for no head")
        # The spec holds the head's tensors if its base had a head: such a base is built, and the head changed after.
        args = {
            **self.spec.copy_arguments(),
            **args,
            "num_classes": classes if bool(classes) == bool(native) else native,
        }
        model = self._build(args, classes, native, global_pool, unfilled)
        settings: Any = getattr(model, "pretrained_cfg", None)
        size = args.get("img_size")
        if size is not None and isinstance(settings, Mapping):
            sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
            write_input_size(model, (settings["input_size"][0], *sides))
        return model

    def _build(
        self, args: dict[str, Any], classes: int, native: int, global_pool: str | None, unfilled: bool
    ) -> nn.Module:
        """Build a model of `classes` classes, from a base of `native` ones."""
        base, call = self.limit.base, self.limit.call_unfilled if unfilled else self.limit.call
        model = call(construct_base, base, **args)
        if self.spec.from_torchvision:
            apply_spec(model, self.spec)
            describe_features(model, self.taps)
            self._fit_torchvision_head(model, native, classes, global_pool)
        elif hasattr(model, "reset_classifier"):
            apply_spec(model, self.spec)
            if getattr(model, "num_classes", native) != classes or global_pool not in (None, find_pool_type(model)):
                head = (classes,) if global_pool is None else (classes, global_pool)
                self.limit.call(call_base, base, model.reset_classifier, *head)
        elif global_pool in (None, find_pool_type(model)):
            apply_spec(model, self.spec)
        else:  # an encoder takes its pooling when it is built, and may then lack modules that the spec names
            pooled = self.limit.call(construct_base, base, **args, global_pool=global_pool)
            return apply_common(pooled, model, self.spec)
        return model

    def build_exported(self, arguments: Mapping[str, Any], num_classes: int, global_pool: str | None) -> nn.Module:
        """Build the model as it was exported, with its image size, classes and pooling; on meta where that works."""
        changed = ("img_size", "num_classes", "global_pool")
        args = {key: value for key, value in arguments.items() if key not in changed}
        return build_on_meta(self.build, {**args, "num_classes": num_classes, "global_pool": global_pool})

    def resize(self, state: Mapping[str, Tensor], model: nn.Module, img_size: Any) -> Mapping[str, Tensor]:
        """Fit weights to a model for another image size by the base's own function, as timm does for the base.

        Raises:
            ArtifactError: that function loses or renames a tensor of these weights.
        """
        args = {**self.spec.copy_arguments(), "img_size": img_size}
        weight_filter = self.limit.call(find_weight_filter, self.limit.base, **args)
        if weight_filter is None:
            return state
        resized: dict[str, Tensor] = self.limit.call(weight_filter, dict(state), model)
        needed = model.state_dict()
        fitting = {name: t for name, t in state.items() if name in needed and t.shape == needed[name].shape}
        resized = {**fitting, **resized}
        if resized.keys() != state.keys():
            name = min(resized.keys() ^ state.keys())
            raise ArtifactError.at(
                "img_size",
                got=f"{reprlib.repr(img_size)}, for which the function of base {self.limit.base!r} that resizes its "
                f"weights loses or renames {name}",
                needed="the size that the model was exported with",
                remedy="leave img_size= out",
            )
        return resized

    def _find_native_classes(self) -> int:
        """The number of classes of the base that the spec describes."""
        args = self.spec.base_args
        native = args["num_classes"] if "num_classes" in args else get_base_settings(self.limit.base).num_classes
        if not is_int(native) or native < 0:
            raise make_spec_error("base_args.num_classes", native, "an integer, 0 for no head")
        return native

    def _fit_torchvision_head(self, model: nn.Module, native: int, classes: int, global_pool: str | None) -> None:
        if global_pool is not None or (classes and not native):
            what = (
                f"global_pool={global_pool!r}" if global_pool is not None else f"num_classes={classes} without a head"
            )
            raise ArtifactError.at(
                f"base {self.limit.base!r}",
                got=f"{what}, which it cannot take",
                needed="the head of the exported model: torchvision models have fixed heads",
                remedy="leave it out",
            )
        if native and not classes:
            remove_classifiers(model)


def find_pool_type(model: nn.Module) -> str | None:
    """Return the pooling of a timm model's head (`avg`, `catavgmax`, ...), None where the model does not say."""
    head = getattr(model, "head", None)
    for module, name in ((head, "global_pool"), (head, "pool_type"), (model, "global_pool")):
        pool = getattr(module, name, None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            return pool
    return None
