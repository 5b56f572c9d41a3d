"""The smallest member of 60 timm model classes: transformers, mixers, hybrids and all.

The families of convolutional networks are tested more deeply in test_zoo.py. Classes that it covers, and those whose
smallest member is large or slow, are left to `recipes/benchmarks/coverage.py`.
"""

import pytest
import timm
import torch
from zoo import randomise

import timm_autoslim
from timm_autoslim.importance import reordered

# The largest error of a joint permutation of all channels in float64, relative to the output: summation order leaves
# more than 9 digits in all but those that cast to float32 inside.
SUMMATION = 1e-9
FLOAT32 = 1e-6
NAMES = [
    "cait_xxs24_224",
    "convit_tiny",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "davit_tiny",
    "deit_tiny_distilled_patch16_224",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "gmlp_ti16_224",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "legacy_xception",
    "levit_128s",
    "lowformer_b0",
    "mvitv2_tiny",
    "nest_tiny",
    "pit_ti_224",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "repghostnet_050",
    "repvit_m1",
    "resnetv2_18",
    "rexnet_100",
    "sequencer2d_s",
    "shvit_s1",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window16_256",
    "test_byobnet",
    "test_coatnet",
    "test_mambaout",
    "test_nfnet",
    "test_vit",
    "test_vit_relpos",
    "tiny_vit_5m_224",
    "twins_svt_small",
    "visformer_tiny",
    "vit_tiny_patch16_dinov3_qkvb",
    "volo_d1_224",
    "xception41p",
    "xcit_nano_12_p8_224",
]
CASTS = {"efficientvit_b0": "its linear attention casts to float32"}


def outputs(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in (out.values() if isinstance(out, dict) else out) for t in outputs(part)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_sliced_right(name):
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    supernet = timm_autoslim.convert(model, keep_output=True)  # so that a permutation leaves even features in place
    space = supernet.space
    whole = model(images)
    assert equal(supernet(images), whole)
    generator = torch.Generator().manual_seed(0)
    arbitrary = {g.name: int(torch.randint(1, g.size + 1, (), generator=generator)) for g in space.groups}
    for widths in (space.min(), space.from_dict(arbitrary)):
        plain = supernet.extract(widths)
        assert type(plain) is type(model)
        assert equal(supernet(images, widths), plain(images))
        assert timm_autoslim.cost(supernet, widths).params == sum(p.numel() for p in plain.parameters())
    double, many = model.double(), images.double()
    for a, b in zip(outputs(double(many)), outputs(reordered(double, supernet.graph, "random")(many)), strict=True):
        bound = FLOAT32 if name in CASTS else SUMMATION
        assert (a - b).abs().max() <= bound * a.abs().max()
