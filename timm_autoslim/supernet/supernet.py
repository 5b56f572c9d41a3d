"""The slimmable supernet: one model, every subnet of it, shared weights."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import TraceError, WidthError
from timm_autoslim.slicing.slices import Slices, apply_slices, extract_model
from timm_autoslim.slicing.tensors import Axis
from timm_autoslim.supernet.space import SearchSpace, Widths
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.trace import Trace
from timm_autoslim.utils.meta import make_meta_example
from timm_autoslim.utils.tensors import collect_tensors

_CACHED_SLICES = 64


class Supernet(nn.Module):
    """A model whose every forward takes the widths of a subnet; made by `convert`.

    Attributes:
        model: the model itself; its parameters are the shared weights of all subnets.
        space: the search space.
        graph: the channel-dependency graph.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> images, widths = torch.randn(2, 3, 32, 32), supernet.space.uniform(0.5)
        >>> supernet(images, widths).shape  # the subnet; `supernet(images)` is the widest
        torch.Size([2, 10])
    """

    model: nn.Module

    def __init__(self, model: nn.Module, trace: Trace, space: SearchSpace, spec: Spec) -> None:
        super().__init__()
        self.model = model
        self.space = space
        self.graph: ChannelGraph = trace.graph
        self._trace = trace
        self._spec = spec  # of the model as it stands
        self._cache: OrderedDict[tuple[int, ...], Slices] = OrderedDict()
        self._held: Widths | None = None  # the widths of the `at` block that is open

    @property
    def base(self) -> str | None:
        """The name that builds the model again, such as "resnet18" or "torchvision/resnet18"; None if it is unknown."""
        return self._spec.base

    @property
    def open_block(self) -> Widths | None:
        """The widths of the `at` block that is open; None if there is none."""
        return self._held

    @property
    def repairs(self) -> tuple[str, ...]:
        """What the proof of the trace had to freeze, each with its reason; empty for most models."""
        return self._trace.repairs

    @property
    def unruled(self) -> tuple[str, ...]:
        """The operators of the model that have no rule, so that what enters them is fixed."""
        return tuple(sorted(self._trace.unruled))

    def forward(self, *inputs: Any, widths: Widths | None = None, **named: Any) -> Any:
        """Run the subnet of these widths; without widths the widest, or that of an open `at` block.

        Args:
            inputs, named: what the model's own forward takes, such as images (N, C, H, W).
            widths: by name, or after the last input: `supernet(images, widths)`.

        Raises:
            WidthError: the widths are of another model, or differ from those of the open block.
            TraceError: the model uses reentrant gradient checkpointing, which would run the whole model in backward.
        """
        if widths is None and inputs:
            last, further = inputs[-1], len(inputs) > self._trace.positional
            if isinstance(last, Widths) or (last is None and further):  # supernet(images, None) is the widest
                inputs, widths = inputs[:-1], last
        if self._held is not None:
            if widths is not None and widths != self._held:
                raise WidthError(
                    "other widths than those of the open `with supernet.at(...)` block; leave the block first"
                )
            return self.model(*inputs, **named)
        if widths is None:
            return self.model(*inputs, **named)
        with self.at(widths):
            out = self.model(*inputs, **named)
        if widths != self.space.max():
            _refuse_reentrant_checkpoints(out)
        return out

    @contextlib.contextmanager
    def at(self, widths: Widths) -> Iterator[Supernet]:
        """Hold the subnet of these widths for the length of the block, around forward and backward.

        Gradients reach the shared weights. Only at the widest do BatchNorm's running statistics move.

        Raises:
            WidthError: the widths are of another model, or a block is open already.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
            >>> with supernet.at(supernet.space.min()) as subnet:
            ...     subnet(torch.randn(2, 3, 32, 32)).sum().backward()
            >>> all(parameter.grad is not None for parameter in supernet.parameters())
            True
        """
        self.space.check(widths)
        if self._held is not None:
            raise WidthError("a `with supernet.at(...)` block is open already; leave it first")
        self._held = widths
        try:
            if widths == self.space.max():
                yield self
            else:
                with apply_slices(self.model, self._slices(widths)):
                    yield self
        finally:
            self._held = None

    def _slices(self, widths: Widths) -> Slices:
        key = widths.values_
        if key not in self._cache:
            found = self.graph.slices(key)
            tensors = {**_statistics(self.model), **found.tensors}
            self._cache[key] = Slices(tensors, found.attributes)
            if len(self._cache) > _CACHED_SLICES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def example(self, batch_size: int = 1) -> Any:
        """Return inputs of the shapes that the model was traced with, of this batch size, on the meta device."""
        return make_meta_example(self._trace.example, batch_size)

    def extract(self, widths: Widths | None = None) -> nn.Module:
        """Return the subnet as an ordinary model of the same type, with weights of its own.

        Its attribute `autoslim` is its spec: how it differs from its base. A narrower subnet has the widest's BatchNorm
        statistics, which are not its own. `num_batches_tracked` marks them: it is 0 or less until `calibrate`, or
        training for as many batches as leave them a hundredth (44 at a momentum of 0.1), renews them, and `export`
        refuses them until then.

        Raises:
            WidthError: the widths are of another model, or an `at` block is open.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
            >>> supernet = supernet.eval()
            >>> widths = supernet.space.uniform(0.5)
            >>> model = supernet.extract(widths)
            >>> type(model).__name__, model.layer1[0].conv1.weight.shape
            ('ResNet', torch.Size([32, 32, 3, 3]))
            >>> images = torch.randn(2, 3, 32, 32)
            >>> torch.equal(model(images), supernet(images, widths))
            True
        """
        widths = self.space.check(widths if widths is not None else self.space.max())
        if self._held is not None:
            raise WidthError(
                "a `with supernet.at(...)` block is open, and its weights are sliced; leave it before extract()"
            )
        whole = widths == self.space.max()
        found = self.graph.slices(widths.values_)
        tensors = {} if whole else {**_statistics(self.model), **found.tensors}
        plain = extract_model(self.model, Slices(tensors, found.attributes))
        if not whole:
            for module in plain.modules():
                tracked = getattr(module, "num_batches_tracked", None)
                if isinstance(tracked, Tensor):
                    tracked.fill_(1 - _batches_to_own(getattr(module, "momentum", None)))
        spec = self._spec.narrow(found, saved=set(self.model.state_dict()), widths=widths.to_dict())
        plain.autoslim = spec  # type: ignore[assignment]
        return plain


def _refuse_reentrant_checkpoints(out: Any) -> None:
    """Raise if backward would run parts of the model again: by then the slices are gone, and nothing would notice."""
    waiting = [t.grad_fn for t in collect_tensors(out) if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise TraceError(
                "the model: got reentrant gradient checkpointing, which runs the forward again in backward, without "
                "the slices of this call; needed: `with supernet.at(widths):` around forward and backward"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _statistics(model: nn.Module) -> dict[str, tuple[Axis, ...]]:
    """Name every running statistic, so that a narrower subnet gets copies even of those that are not narrowed."""
    names: dict[str, tuple[Axis, ...]] = {}
    for path, module in model.named_modules():
        for leaf in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = module._buffers.get(leaf)
            if buffer is not None:
                names[f"{path}.{leaf}" if path else leaf] = (None,) * buffer.dim()
    return names


def _batches_to_own(momentum: float | None) -> int:
    """In how many batches of training BatchNorm statistics become a module's own, but for a hundredth."""
    if momentum is None or not 0 < momentum < 1:  # a cumulative average, or none: the first batch replaces what was
        return 1
    return math.ceil(math.log(0.01) / math.log1p(-momentum))
