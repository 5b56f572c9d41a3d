"""One small member of every timm model class and of torchvision's transformers, through the whole chain.

Members are made small by their own arguments (two blocks, small images), so that the chain runs for all of them;
`recipes/benchmarks/coverage.py` takes every model as it is. The convolutional families, torchvision's among them, are
tested more deeply in test_zoo.py.
"""

import pytest
import torch
from helpers.members import (
    CASTS,
    MAXVIT,
    MEMBERS,
    SUMMATION,
    arbitrary,
    build,
    check_fused,
    check_reloaded,
    equal,
    error,
    outputs,
)

import timm_autoslim
from timm_autoslim.supernet.order import reorder_channels

FLOAT32 = 1e-6
MAXVIT |= {"block_layers": [1, 1], "head_dim": 16, "stochastic_depth_prob": 0.0}


@pytest.mark.parametrize("name", MEMBERS)
def test_every_class_goes_through_the_whole_chain(name, tmp_path):
    model, arguments, pixels = build(name)
    images = torch.randn(2, 3, pixels, pixels)
    supernet = timm_autoslim.convert(model, images[:1], keep_output=True, base=name, base_args=arguments)
    space = supernet.space
    bound = FLOAT32 if name in CASTS else SUMMATION
    with torch.no_grad():
        assert equal(supernet(images), model(images))
        for widths in (space.min(), arbitrary(space, 0)):
            plain = supernet.extract(widths)
            assert type(plain) is type(model)
            assert equal(supernet(images, widths), plain(images))
            assert timm_autoslim.cost(supernet, widths).params == sum(p.numel() for p in plain.parameters())
        check_reloaded(plain, images, tmp_path / "out")
        check_fused(plain.double(), images.double(), bound)
    check_gradients(supernet, widths, images)
    with torch.no_grad():
        double, many = model.double().eval(), images.double()
        slimmable = reorder_channels(double, supernet.graph, "random")
        assert error(double(many), slimmable(many)) <= bound


def check_gradients(supernet, widths, images):
    """A backward pass of a subnet reaches the weights that one of the whole reaches, and only inside the subnet."""

    def reached(widths):
        supernet.zero_grad(set_to_none=True)
        sum(t.square().mean() for t in outputs(supernet(images, widths))).backward()
        return {n: p.grad for n, p in supernet.model.named_parameters() if p.grad is not None}

    supernet.train()
    whole, inside = set(reached(None)), reached(widths)
    assert set(inside) == whole
    slices = supernet.graph.slices(widths.values_)
    for name, gradient in inside.items():
        assert gradient.isfinite().all()
        for axis, runs in enumerate(slices.tensors.get(name, ())):
            if runs is not None:
                dropped = torch.ones(gradient.shape[axis], dtype=torch.bool)
                for start, length in runs:
                    dropped[start : start + length] = False
                assert not gradient.index_select(axis, dropped.nonzero().ravel()).any(), name
    supernet.zero_grad(set_to_none=True)
