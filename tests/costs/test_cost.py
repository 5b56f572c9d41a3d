"""Costs are exact: the published networks cost what was published. A cost is plain data."""

import gc
import pickle
import weakref
from dataclasses import FrozenInstanceError, replace

import pytest
import timm
import torch
import torchvision
from helpers.marks import slow_but
from helpers.models import TwoGroups
from timm.models.efficientnet import _gen_mobilenet_v2
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim import METRICS, Cost, convert, cost, cost_by_module, search
from timm_autoslim.costs.cost import count_cost
from timm_autoslim.errors import BudgetError, ConfigError, WidthError

# AutoSlim (arXiv 1903.11728), the authors' published channel lists. MobileNet-v2: stem, out of block 0, then (expanded,
# out) of the other 16 blocks, tail, classes; made from a network that is 1.5 times as wide.
MOBILENET_V2_207M = """8 8 96 16 96 16 96 24 144 24 144 24 144 48 288 48 288 48 288 48 288 64 432 64 432 64 648 176 720
    176 720 176 1440 280 1920 1000"""


MOBILENET_V2_305M = """8 8 96 16 96 16 96 24 144 24 144 24 144 56 288 56 288 56 288 56 288 96 432 96 432 96 864 240
    1440 240 960 240 1440 480 1920 1000"""


# ResNet-50: stem, then for every stage the shortcut and (mid, mid, out) of each block, classes.
RESNET50_570M = """24 72 8 16 72 16 16 72 8 8 72 240 16 24 240 16 24 240 16 16 240 16 24 240 704 72 72 704 48 72 704
    48 72 704 72 72 704 48 48 704 48 48 704 1680 280 240 1680 120 200 1680 280 280 1680 1000"""


RESNET50_2G = """40 120 16 16 120 24 24 120 16 24 120 440 48 72 440 32 48 440 40 56 440 64 72 440 1024 168 168 1024 96
    144 1024 120 168 1024 120 144 1024 120 144 1024 256 256 1024 2016 512 512 2016 480 480 2016 512 512 2016 1000"""


POOLED = 7 * 7  # the authors add one operation for each value that the last pool reads, and we do not


WIDE = {  # with the number of convolutions in the network's last layer but one
    "timm": lambda: _gen_mobilenet_v2("mobilenetv2_150", 1.5),
    "torchvision": lambda: torchvision.models.mobilenet_v2(width_mult=1.5),
}


RESNET50 = {"timm": lambda: timm.create_model("resnet50"), "torchvision": lambda: torchvision.models.resnet50()}


def on_meta(build):
    with torch.device("meta"):
        return build()


def mobilenet_v2_modules(model):
    """The dense convolutions and the classifier in the order of the published lists: depthwise ones repeat a number."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]


def resnet50_modules(model):
    """As above; the shortcut's convolution is defined at the end of a stage's first block, and listed first."""
    paths = ["conv1"]
    for stage in range(1, 5):
        blocks = len(model.get_submodule(f"layer{stage}"))
        paths += [f"layer{stage}.0.downsample.0"]
        paths += [f"layer{stage}.{block}.conv{i}" for block in range(blocks) for i in (1, 2, 3)]
    return [*paths, "fc"]


def assert_published(model, modules, channels, published):
    channels = [int(n) for n in channels.split()]
    supernet = convert(model)
    wanted = dict(zip(modules, channels, strict=True))
    classifier = modules[-1]
    assert wanted.pop(classifier) == 1000
    widths = supernet.space.from_channels(wanted)
    counts = supernet.space.channels(widths)
    assert {path: counts[path] for path in modules} == {**wanted, classifier: 1000}
    assert cost(supernet, widths).macs == published - channels[-2] * POOLED
    assert sum(cost_by_module(supernet, widths).values()) == published - channels[-2] * POOLED


@pytest.mark.slow
@pytest.mark.parametrize("library", WIDE)
@pytest.mark.parametrize(
    ("channels", "published"),
    [(MOBILENET_V2_207M, 206_861_128), (MOBILENET_V2_305M, 305_166_496)],
    ids=["207M", "305M"],
)
def test_published_mobilenet_v2(library, channels, published):
    model = on_meta(WIDE[library])
    assert_published(model, mobilenet_v2_modules(model), channels, published)


@pytest.mark.parametrize("library", slow_but(["torchvision"], RESNET50))
@pytest.mark.parametrize(
    ("channels", "published"),
    [pytest.param(RESNET50_570M, 570_087_056, marks=pytest.mark.slow), (RESNET50_2G, 2_006_144_224)],
    ids=["570M", "2G"],
)
def test_published_resnet50(library, channels, published):
    model = on_meta(RESNET50[library])
    assert_published(model, resnet50_modules(model), channels, published)


@pytest.mark.parametrize(
    ("build", "macs", "params"),
    [
        pytest.param(torchvision.models.mobilenet_v2, 300_774_272, 3_504_872, marks=pytest.mark.slow),
        pytest.param(lambda: timm.create_model("mobilenetv2_100"), 300_774_272, 3_504_872, marks=pytest.mark.slow),
        (torchvision.models.resnet50, 4_089_184_256, 25_557_032),
        pytest.param(lambda: timm.create_model("resnet50"), 4_089_184_256, 25_557_032, marks=pytest.mark.slow),
    ],
    ids=["torchvision/mobilenet_v2", "timm/mobilenetv2_100", "torchvision/resnet50", "timm/resnet50"],
)
def test_models_as_they_are(build, macs, params):
    assert cost(convert(on_meta(build))) == Cost(macs, params)


@pytest.fixture(scope="module")
def supernet():
    return convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))


def by_hand(stem, inner, pixels=64):
    macs = {
        "stem": 27 * stem * pixels, "inner": 9 * stem * inner * pixels, "outer": inner * stem * pixels,
        "head": 10 * stem,
    }  # fmt: skip
    norms = 2 * (2 * stem + inner)
    return macs, 27 * stem + 9 * stem * inner + inner * stem + norms + 10 * stem + 10


@pytest.mark.parametrize(("stem", "inner"), [(32, 64), (5, 7), (1, 1)])
def test_macs_and_params_by_hand(supernet, stem, inner):
    widths = supernet.space.from_dict({"stem": stem, "inner": inner})
    macs, params = by_hand(stem, inner)
    assert cost(supernet, widths) == Cost(sum(macs.values()), params)
    assert cost_by_module(supernet, widths) == macs
    assert list(cost_by_module(supernet)) == ["stem", "inner", "outer", "head"]


def test_without_widths_the_cost_is_that_of_the_widest(supernet):
    assert cost(supernet) == cost(supernet, supernet.space.max())
    assert cost_by_module(supernet) == cost_by_module(supernet, supernet.space.max())


def test_the_cost_is_for_one_image_whatever_the_batch_of_the_example():
    assert cost(convert(TwoGroups(32), torch.zeros(7, 3, 8, 8))) == cost(
        convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))
    )


def test_frozen_parameters_count_as_well():
    model = TwoGroups(32)
    model.stem.weight.requires_grad_(False)
    assert cost(convert(model, torch.zeros(1, 3, 8, 8))).params == sum(p.numel() for p in model.parameters())


def test_widths_of_another_model_are_refused(supernet):
    other = convert(TwoGroups(16), torch.zeros(1, 3, 8, 8)).space.max()
    for function in (cost, cost_by_module):
        with pytest.raises(WidthError, match="got widths of another model"):
            function(supernet, other)
        with pytest.raises(ConfigError, match="the supernet: got a TwoGroups; needed: a Supernet, as convert"):
            function(supernet.model)


def test_a_cost_is_plain_data():
    supernet = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))
    one, eight = (cost(supernet, batch_size=n) for n in (1, 8))
    assert one != eight
    assert one.peak_bytes < eight.peak_bytes
    assert one != cost(supernet) == Cost(one.macs, one.params)
    assert one == cost(supernet, batch_size=1)
    assert pickle.loads(pickle.dumps(one)) == one == replace(eight, peak_bytes=one.peak_bytes)
    assert len({one, eight, cost(supernet), cost(supernet)}) == 3
    with pytest.raises(FrozenInstanceError):
        one.macs = 5
    assert one.to_dict() == {"macs": one.macs, "params": one.params, "peak_bytes": one.peak_bytes}


def test_a_result_holds_no_supernet():
    supernet = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))
    result = search(supernet, ["peak_bytes<=60%"], lambda subnet: 1.0)
    assert len(pickle.dumps(result)) < 8000
    network, alive = result.networks[0], weakref.ref(supernet)
    assert network.cost == cost(supernet, network.widths, batch_size=1)
    assert network.cost.peak_bytes <= network.budget
    del supernet
    gc.collect()
    assert alive() is None


def test_a_metric_is_picked_by_its_name():
    full = Cost(1, 2, 3, 4.5)
    assert [full.pick(metric) for metric in METRICS] == [1, 2, 3, 4.5]
    with pytest.raises(BudgetError, match=r"peak_bytes: got a cost that was counted without it; .*batch_size=1\)"):
        Cost(1, 2).pick("peak_bytes")
    with pytest.raises(BudgetError, match=r"latency_ms: got a cost that was counted without it; .*latency=table\)"):
        Cost(1, 2, 3).pick("latency_ms")
    with pytest.raises(BudgetError, match=r"metric: got 'flops'; needed: one of \['macs', 'params', 'peak_bytes',"):
        full.pick("flops")


def test_only_what_is_asked_for_is_counted(supernet):
    assert cost(supernet).peak_bytes is None
    assert cost(supernet).latency_ms is None
    assert cost(supernet, dtype=torch.float16).peak_bytes < cost(supernet, batch_size=1).peak_bytes
    assert count_cost(supernet, supernet.space.max(), ["peak_bytes"]) == cost(supernet, batch_size=1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 96}),
        pytest.param("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
        pytest.param("xcit_nano_12_p16_224", {"depth": 2}, marks=pytest.mark.slow),
        ("test_vit", {}),
    ],
)
@torch.no_grad()
def test_products_of_attention_are_what_a_counter_finds(name, arguments):
    model = timm.create_model(name, img_size=64, num_classes=10, **arguments).eval()
    images = torch.randn(1, 3, 64, 64)
    supernet = convert(model, images)
    for widths in (supernet.space.max(), supernet.space.sample(torch.Generator().manual_seed(0)), supernet.space.min()):
        # the counter does not know the fused kernel of CPUs
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            supernet.extract(widths)(images)
        assert 2 * cost(supernet, widths).macs == counter.get_total_flops()
