"""Small networks of every form, and the checks that must hold of each conversion."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from helpers.widths import arbitrary_widths
from timm_autoslim import convert, cost
from timm_autoslim.errors import TraceError

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(TwoGroups):
    """`TwoGroups` in two steps, with a body between them that a test gives, and the layers that it needs."""

    def __init__(self, body=None, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = body

    def maps(self, x):
        """Return features (N, 8, H, W)."""
        x = self.bn(self.stem(x)).relu()
        return x + self.bn_outer(self.outer(self.bn_inner(self.inner(x)).relu()))

    def logits(self, x):
        return self.head(x.relu().mean((2, 3)))

    def forward(self, *inputs, **named):
        return self.body(self, *inputs, **named)


def make_images(*shape):
    return torch.randn(shape or (2, 3, 8, 8))


def list_tensors(out):
    """Return the tensors of an output, wherever they are in it."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    elif not isinstance(out, (tuple, list)) and hasattr(out, "__slots__"):
        out = [getattr(out, name) for name in np.atleast_1d(out.__slots__)]
    elif hasattr(out, "__dict__"):
        out = list(vars(out).values())
    return [t for value in out for t in list_tensors(value)] if isinstance(out, (list, tuple, deque)) else []


def read_state(model):
    """Return all that a conversion could change in a model, gradients and flags included."""
    flags = {n: (p.requires_grad, id(p.grad), p._version) for n, p in model.named_parameters()}
    return flags, {n: b._version for n, b in model.named_buffers()}, snapshot(model)


def assert_untouched(before, model):
    after = read_state(model)
    assert before[:2] == after[:2]
    assert_same(before[2], after[2])


def check_conversion(model, example=IMAGE, inputs=None, count=True, **options):
    """Convert a model, check all that must hold of every conversion, and return the supernet.

    Args:
        model: the model; its state is the same afterwards.
        example: the example input.
        inputs: inputs with data, of two images; random images by default.
        count: whether torch's counter and ours must agree on the MACs.
        options: of `convert`.
    """
    model = model.train()
    model.bn.eval()  # a mixture of modes
    model.stem.weight.requires_grad_(False)
    before, generator = read_state(model), torch.get_rng_state()
    supernet = convert(model, example, **options)
    assert torch.equal(generator, torch.get_rng_state())
    assert_untouched(before, model)
    model.eval()
    inputs = make_images() if inputs is None else inputs
    named = inputs if isinstance(inputs, dict) else {}
    inputs = () if named else inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        original = list_tensors(model(*inputs, **named))
        for out in (supernet(*inputs, **named), supernet(*inputs, widths=supernet.space.max(), **named)):
            assert all(torch.equal(a, b) for a, b in zip(list_tensors(out), original, strict=True))
        for seed in range(3):
            widths = arbitrary_widths(supernet.space, torch.Generator().manual_seed(seed))
            extracted = supernet.extract(widths)
            with FlopCounterMode(display=False) as counter:
                expected = list_tensors(extracted(*inputs, **named))
            assert expected
            if count:
                assert counter.get_total_flops() == 2 * 2 * cost(supernet, widths).macs  # two images, two for a MAC
            assert cost(supernet, widths).params == sum(p.numel() for p in extracted.parameters())
            if options.get("keep_output", True) is True:
                assert [t.shape for t in expected] == [t.shape for t in original]
            outs = [supernet(*inputs, widths, **named), supernet(*inputs, widths=widths, **named)]
            with supernet.at(widths):
                outs += [supernet(*inputs, **named), supernet(*inputs, widths, **named)]
            for out in outs:
                assert all(torch.equal(a, b) for a, b in zip(list_tensors(out), expected, strict=True))
    model.train()
    model.bn.eval()
    assert_untouched(before, model)
    return supernet


def run_in_a_row(self, x):
    """Run the layers `a` and `b` one after the other."""
    return self.logits(self.b(self.a(self.maps(x)).relu()))


def make_net(layer=None, body=run_in_a_row):
    """Return a network in training mode; this layer, from 8 to 6 channels, is at the path `a`."""
    model = randomise(Net(body, a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 8, 1)))
    if layer is not None:
        model.a = layer
    return model


def make_conv():
    return nn.Conv2d(8, 6, 1)


def identify(value):
    """Return a value's type and identity, and those of its members."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return type(value), id(value), [(name, id(v)) for name, v in members]


def read_outline(model):
    """Return the attributes of every module by identity: for models whose tensors cannot be compared."""
    return {
        path: {name: identify(value) for name, value in vars(module).items()}
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }


def is_comparable(model):
    """Return whether a model has ordinary tensors only."""
    tensors = [*model.parameters(), *model.buffers()]
    strange = any(isinstance(m, (torch.jit.ScriptModule, FullyShardedDataParallel)) for m in model.modules())
    packed = any(not isinstance(v, torch.Tensor) for v in model.state_dict().values())
    return not (strange or packed or any(nn.parameter.is_lazy(t) or t.is_inference() for t in tensors))


def check_refusal(model, message, example=IMAGE):
    """Check that a model is refused with this message and left as it was, and return the error."""
    values = read_state(model) if is_comparable(model) else None
    outline = read_outline(model)
    with pytest.raises(TraceError, match=message) as info:
        convert(model, example)
    assert read_outline(model) == outline
    if values:
        assert_untouched(values, model)
    return info.value
