"""One small member of every timm model class and of torchvision's transformers, through the whole chain.

`recipes/benchmarks/coverage.py` takes every model as it is. The convolutional families, torchvision's among them, are
tested more deeply in test_zoo.py.
"""

import warnings

import pytest
import timm
import torch
from helpers.comparisons import check_fused, equal, error, outputs
from helpers.marks import slow_but
from helpers.members import MEMBERS, build
from helpers.models import mark_calibrated
from helpers.widths import arbitrary_widths

import timm_autoslim
from timm_autoslim.supernet.order import reorder_channels

# The largest error in float64, relative to the output: summation order leaves more than 9 digits in all models but
# those that cast to float32 inside.
SUMMATION = 1e-9
FLOAT32 = 1e-6
CASTS = {
    "efficientvit_b0": "its linear attention casts to float32",
    "efficientvit_l1": "its linear attention casts to float32",
    "deepseek_vit_412m": "its norms cast to float32",
    "deepseek_vit_412m_enc": "its norms cast to float32",
}


# Convolutions, patches, attention; the blocks of test_random_networks.py have gates and depthwise convolutions.
QUICK = ["test_resnet", "test_vit"]


@pytest.mark.parametrize("name", slow_but(QUICK, MEMBERS))
def test_every_class_goes_through_the_whole_chain(name, tmp_path):
    model, arguments, pixels = build(name)
    images = torch.randn(2, 3, pixels, pixels)
    supernet = timm_autoslim.convert(model, images[:1], keep_output=True, base=name, base_args=arguments)
    space = supernet.space
    bound = FLOAT32 if name in CASTS else SUMMATION
    with torch.no_grad():
        assert equal(supernet(images), model(images))
        for widths in (space.min(), arbitrary_widths(space, torch.Generator().manual_seed(0))):
            slim = supernet.extract(widths)
            assert type(slim) is type(model)
            assert equal(supernet(images, widths), slim(images))
            assert timm_autoslim.cost(supernet, widths).params == sum(p.numel() for p in slim.parameters())
        check_reloaded(slim, images, tmp_path / "out")
        check_fused(slim.double(), images.double(), bound)
    check_gradients(supernet, widths, images)
    with torch.no_grad():
        model, images = model.double().eval(), images.double()
        assert error(model(images), reorder_channels(model, supernet.graph, "random")(images)) <= bound


def check_reloaded(slim, images, folder):
    """An exported and reloaded model is the extracted one, bit for bit."""
    timm_autoslim.export(mark_calibrated(slim), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert equal(again(images), slim(images))


def check_gradients(supernet, widths, images):
    """A backward pass of a subnet reaches the weights that one of the widest reaches, and only inside the subnet."""

    def gradients(widths):
        supernet.zero_grad(set_to_none=True)
        sum(t.square().mean() for t in outputs(supernet(images, widths))).backward()
        return {n: p.grad for n, p in supernet.model.named_parameters() if p.grad is not None}

    supernet.train()
    widest, inside = gradients(None), gradients(widths)
    assert inside.keys() == widest.keys()
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
