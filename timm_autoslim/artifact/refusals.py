"""What is refused before a slim model is written: one without a spec or numbers, or that runs layers of another one."""

from __future__ import annotations

import reprlib
from collections.abc import Callable

from torch import Tensor, nn

from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError, StaleStatisticsError
from timm_autoslim.utils.ways import find_strangers


def require_spec(model: nn.Module, function: str) -> Spec:
    """Return the spec of a slim model.

    Args:
        model: the model.
        function: what is called with it, for messages.

    Raises:
        ArtifactError: the model is compiled, or has none.
    """
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ArtifactError.at(
            kind,
            got="a compiled model",
            needed="the model that it was made of",
            remedy=f"{function}(model._orig_mod, ...)",
        )
    spec = getattr(model, "autoslim", None)
    if not isinstance(spec, Spec):
        raise ArtifactError.at(
            kind,
            got="no spec" if spec is None else f"an `autoslim` attribute {reprlib.repr(spec)}, which is no spec",
            needed="a slim model, with its spec as `autoslim` attribute",
            remedy="use supernet.extract(widths), and unwrap DistributedDataParallel or a compiled model first",
        )
    return spec


def refuse_without_numbers(model: nn.Module) -> None:
    """Raise ArtifactError for a tensor on the meta device, or with NaN in it."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or tensor.isnan().any():
            got = "a tensor on the meta device" if tensor.is_meta else "weights that are NaN"
            raise ArtifactError.at(name, got=got, needed="numbers", remedy="export a model that works")


def refuse_stale(
    model: nn.Module, spec: Spec, find_unused: Callable[[], set[str]], advice: str = "before export"
) -> None:
    """Raise StaleStatisticsError for a BatchNorm whose statistics are not those of this narrower model.

    Args:
        model: the slim model.
        spec: its spec.
        find_unused: returns the paths of the modules that do not run in evaluation.
        advice: the end of the message.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    batches = {name: int(m.num_batches_tracked) for name, m in norms.items() if m.num_batches_tracked is not None}
    stale = {name: count for name, count in batches.items() if count < 1}
    if not spec.sizes or not stale:
        return
    # What calibrate() does not reach does not run in evaluation either. It is the parent that counts: it may use the
    # tensors of its BatchNorm without calling it.
    unused = find_unused()
    for name, count in stale.items():
        if name.rpartition(".")[0] not in unused:
            raise StaleStatisticsError.at(
                name,
                got="BatchNorm statistics that are those of the widest subnet, or were "
                f"{1 - count} batches of training short of being this narrower model's",
                needed="statistics of this model",
                remedy=f"call timm_autoslim.calibrate(model, batches), or fine-tune it for longer, {advice}",
            )


def refuse_strangers(model: nn.Module) -> None:
    """Raise ArtifactError where a model's code leads to layers like its own in another model, as in a deep copy of one.

    Raises:
        ArtifactError: it does; the weights there are not those that would be saved.
    """
    parts: list[nn.Module | nn.Parameter] = [*model.modules(), *model.parameters()]
    own = set(map(_describe, parts))
    for part, way in find_strangers(model):
        if _describe(part) in own:
            raise ArtifactError.at(
                "the model",
                got=f"code that can read a {type(part).__name__} of another model as {way}, beside one of its own",
                needed="code that finds the layers of the model itself; copy.deepcopy leaves closures over those of "
                "the model that was copied",
                remedy="save the model that was copied, or extract another one",
            )


def _describe(part: nn.Module | nn.Parameter) -> tuple[type, tuple[object, ...]]:
    """Return the class of a module or parameter, and the shapes of its weights; two that differ are of each other."""
    tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part}
    shapes = tuple((name, tuple(t.shape)) for name, t in tensors.items() if isinstance(t, Tensor))
    return (type(part), shapes) if shapes else (type(part), (id(part),))
