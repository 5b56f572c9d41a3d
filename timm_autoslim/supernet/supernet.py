"""The slimmable supernet: one model, every subnet of it, shared weights."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from timm_autoslim.artifact.outline import Outline
from timm_autoslim.artifact.parts import describe_parts
from timm_autoslim.artifact.preparation import find_image_size, write_input_size
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import WidthError
from timm_autoslim.slicing.replica import replicate
from timm_autoslim.slicing.slices import Slices, extract_model
from timm_autoslim.supernet.blocks import Block, OpenBlocks
from timm_autoslim.supernet.guard import Guard
from timm_autoslim.supernet.leftovers import Leftovers, find_leftovers
from timm_autoslim.supernet.space import SearchSpace
from timm_autoslim.supernet.timm_attributes import TIMM_ATTRIBUTES
from timm_autoslim.supernet.widths import Widths
from timm_autoslim.tracing.graph import ChannelGraph
from timm_autoslim.tracing.strays import check_subnet, list_global_hooks
from timm_autoslim.tracing.tracer import Trace
from timm_autoslim.utils.arguments import check_integer, quote
from timm_autoslim.utils.copying import copy_within
from timm_autoslim.utils.meta import count_images, make_meta_example
from timm_autoslim.utils.redirecting import redirect_functions
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
        self._guard = Guard(model, trace.graph, trace.written)
        self._cache: OrderedDict[tuple[int, ...], Slices] = OrderedDict()
        self._blocks = OpenBlocks()
        self._has_blocks = False  # whether any was ever opened

    def __getattr__(self, name: str) -> Any:
        """Return what timm's optimizers ask a model for, of the supernet's parameters; all else as `nn.Module`."""
        if name in TIMM_ATTRIBUTES:
            return TIMM_ATTRIBUTES[name](self.model)
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Supernet:
        """Return a deep copy, in which closures and hooks of the model refer to the copy's modules."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copy_within(self.model, memo)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        redirect_functions(copied, memo)
        return copied

    @property
    def base(self) -> str | None:
        """The name that builds the model again, such as "resnet18" or "torchvision/resnet18"; None if it is unknown."""
        return self._spec.base

    @property
    def open_block(self) -> Widths | None:
        """The widths of the `at` block that this thread has open, the innermost; None if there is none."""
        return self._blocks.widths

    @property
    def repairs(self) -> tuple[str, ...]:
        """What the proof of the trace had to freeze, each with its reason; empty for most models."""
        return self._trace.repairs

    @property
    def constants(self) -> tuple[str, ...]:
        """The numbers that multiply attention scores and stay at all widths, since they are no power of the channels.

        A scale such as `head_dim ** -0.5` is none of them: it follows the channels, or keeps them with a reason.
        """
        return self._trace.constants

    @property
    def unruled(self) -> tuple[str, ...]:
        """The operators of the model that have no rule, so that what enters them is fixed."""
        return tuple(sorted(self._trace.unruled))

    def forward(self, *inputs: Any, widths: Widths | None = None, **named: Any) -> Any:
        """Run the subnet of these widths; without widths that of the open `at` block, or the widest.

        A narrower subnet runs as a replica with slices of the weights (`subnet`), and leaves no trace in the model: an
        exception or an interrupt finds it as it was, and threads can run different subnets at the same time. Gradients
        reach the shared weights. State that a forward writes, such as BatchNorm's running statistics, follows the
        widest alone.

        Args:
            inputs, named: what the model's own forward takes, such as images (N, C, H, W).
            widths: by name, or after the last input: `supernet(images, widths)`.

        Raises:
            WidthError: the widths are of another model, or of another type; or a forward that is computed again in
                backward does not name its widths, see `at`.
            ModelChangedError: widths are given, and the model has changed since it was converted, or it holds what a
                forward of another width has kept for the next one.
        """
        if widths is None and inputs:
            last, further = inputs[-1], len(inputs) > self._trace.positional
            if isinstance(last, Widths) or (last is None and further):  # supernet(images, None) is the widest
                inputs, widths = inputs[:-1], last
            elif further:
                _check_further_input(last)
        if widths is None:
            widths = self._find_block()
        if widths is None:
            return self.model(*inputs, **named)
        if self.space.check(widths) == self.space.max():
            self._guard.check(self.model, numbers=False)
            return self.model(*inputs, **named)
        subnet = self.subnet(widths)
        try:
            return subnet(*inputs, **named)
        except RuntimeError as error:
            leftovers = self._find_leftovers(self._slices(widths))
            if leftovers is None:
                raise
            raise leftovers.explain(error) from error

    def _find_leftovers(self, slices: Slices) -> Leftovers | None:
        """Return what a forward has kept in the model that a subnet cannot take; None if there is nothing."""
        try:
            return find_leftovers(self.model, slices, self._trace.example)
        except Exception:  # whatever the model raises on the meta device, the error of the subnet itself says more
            return None

    def subnet(self, widths: Widths) -> nn.Module:
        """Return the subnet of these widths as a model that shares the weights, as they are now.

        It is for a few calls: after an optimizer step, or a change of the model, ask for another one. It is a model of
        its own: where it meets what a forward of another width has kept, such as a video's last frame, it raises an
        error about shapes, while `supernet(images, widths)` names what it is.

        Raises:
            WidthError: the widths are of another model.
            ModelChangedError: the model has changed since it was converted, or got a hook that reads the original.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
            >>> subnet = supernet.subnet(supernet.space.min())
            >>> subnet.layer1[0].conv1.weight.shape, supernet.model.layer1[0].conv1.weight.shape
            (torch.Size([16, 16, 3, 3]), torch.Size([64, 64, 3, 3]))
        """
        widths = self.space.check(widths)
        self._guard.check(self.model, numbers=False)
        slices, others = self._slices(widths), list[Any]()
        subnet = replicate(self.model, slices, others)
        if others or list_global_hooks():
            check_subnet(subnet, self.model, slices)
        return subnet

    def check_model(self) -> None:
        """Make sure that the model is still the one that was converted, as everything that takes widths does.

        Weights, types, devices and hooks may change. Layers, shapes of weights, hyperparameters (a stride) and the size
        of the images may not: slices and costs follow from them.

        Raises:
            ModelChangedError: the model has changed; the text says what.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import AutoSlimError, convert
            >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
            >>> supernet.model.reset_classifier(0)
            >>> try:
            ...     supernet.check_model()
            ... except AutoSlimError as error:
            ...     print(str(error)[:80])
            the model: got changes since it was converted (fc.weight is gone; fc.bias is gon
        """
        self._guard.check(self.model)

    def at(self, widths: Widths) -> Block[Supernet]:
        """Return a block in which `supernet(images)` is the subnet of these widths, in the thread that opens it.

        Every call in the block takes the weights as they are then. Blocks can be nested, and widths that a call names
        win over those of the block. A checkpoint around the supernet calls it again in backward, where the block may
        have ended: name the widths then, `checkpoint(supernet, images, widths)`.

        Raises:
            WidthError: the widths are of another model.
            ModelChangedError: the model has changed since it was converted.

        Example:
            >>> import timm, torch
            >>> from timm_autoslim import convert
            >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
            >>> with supernet.at(supernet.space.min()):
            ...     supernet(torch.randn(2, 3, 32, 32)).sum().backward()
            >>> all(parameter.grad is not None for parameter in supernet.parameters())
            True
        """
        widths = self.space.check(widths)
        self._guard.check(self.model, numbers=False)
        self._has_blocks = True
        return Block(self, self._blocks, widths)

    def _find_block(self) -> Widths | None:
        """Return the widths of the open block, for a call that names none.

        Raises:
            WidthError: the call is part of a backward pass. Whichever block is open now, or in the thread that computes
                gradients, may be another one than that of the forward.
        """
        if self._has_blocks and torch._C._current_graph_task_id() != -1:
            raise WidthError.at(
                "widths",
                got="none, in a forward that a checkpoint computes again in backward",
                needed="widths, where `at` blocks are used: the block of the first forward may have ended",
                remedy="pass them along: checkpoint(supernet, images, widths)",
            )
        return self.open_block

    def _slices(self, widths: Widths) -> Slices:
        key = widths.values_
        slices = self._cache.get(key)
        if slices is None:
            slices = self._cache[key] = self.graph.slices(key)
            while len(self._cache) > _CACHED_SLICES:
                self._cache.popitem(last=False)
        return slices

    @property
    def traced_batch_size(self) -> int:
        """The length of the batch that the model was traced with: it takes this one for sure."""
        return count_images(self._trace.example)

    @property
    def takes_any_batch_size(self) -> bool:
        """Whether the inputs' first dimension is a batch of any length; else the model takes one length alone."""
        return self._trace.batch

    def example(self, batch_size: int = 1) -> Any:
        """Return inputs of the shapes that the model was traced with, of this batch size, on the meta device.

        Where the model takes the length of the example's first dimension alone, these are the example's shapes.

        Raises:
            WidthError: the batch size is no positive integer, or not 1 where the model takes one length alone.
        """
        example = self._trace.example
        check_integer("batch_size", batch_size, WidthError)
        if self._trace.batch:
            return make_meta_example(example, batch_size)
        if batch_size not in (1, count_images(example)):
            needed = "1, which stands for the example: the model takes no other length of its first dimension"
            raise WidthError.at("batch_size", got=str(batch_size), needed=needed)
        return example

    def extract(self, widths: Widths | None = None) -> nn.Module:
        """Return the subnet as an ordinary model of the same type, with weights of its own.

        Its attribute `autoslim` is its spec: how it differs from its base. Models of timm in it have such specs too, so
        that `export(model.body, folder)` works. Its `pretrained_cfg` says the size of the images that the supernet was
        traced with, for timm, `export` and its card.

        What a forward of the widest has kept for its next call, such as the features of a video's last frame, stays
        behind where its shape is another at these widths. A narrower subnet has the widest's BatchNorm statistics,
        which are not its own. `num_batches_tracked` marks them: it is 0 or less until `calibrate`, or training for as
        many batches as leave them a hundredth (44 at a momentum of 0.1), renews them, and `export` refuses them until
        then.

        Raises:
            WidthError: the widths are of another model.
            ModelChangedError: the model has changed since it was converted.

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
        self.check_model()
        slices = self.graph.slices(widths.values_)
        leftovers = self._find_leftovers(slices)
        model = extract_model(self.model, slices)
        check_subnet(model, self.model, None)
        if leftovers is not None:
            leftovers.empty(model)
        if widths != self.space.max():
            for module in model.modules():
                tracked = getattr(module, "num_batches_tracked", None)
                if isinstance(tracked, Tensor):
                    tracked.fill_(1 - _count_batches_to_renew(getattr(module, "momentum", None)))
        written = self._trace.written
        outline = Outline.draw(model, slices.tensors, slices.attributes, written)
        spec = self._spec.narrow(slices, set(self.model.state_dict()), widths.to_dict(), outline)
        model.autoslim = spec  # type: ignore[assignment]
        describe_parts(model, slices, widths.to_dict(), self._trace.input_shapes, written)
        size = find_image_size(self._trace.example)
        if size and (spec.base is not None or isinstance(getattr(model, "pretrained_cfg", None), Mapping)):
            write_input_size(model, size)
        return model


def _check_further_input(value: Any) -> None:
    """Raise WidthError if an input beyond those of the traced forward looks like widths of the wrong type."""
    if isinstance(value, (Real, str, bytes, Mapping, list, tuple)) and not isinstance(value, bool):
        if collect_tensors(value):
            return
        raise WidthError.at(
            "widths",
            got=quote(value),
            needed="Widths, from supernet.space.from_dict({name: width}), .uniform(ratio), .max() and so on",
            remedy="pass an input of the model by its name",
        )


def _count_batches_to_renew(momentum: float | None) -> int:
    """Return how many batches of training leave a hundredth of the BatchNorm statistics that were there before."""
    if momentum is None or not 0 < momentum < 1:  # a cumulative average, or none: the first batch replaces what was
        return 1
    return math.ceil(math.log(0.01) / math.log1p(-momentum))
