"""Costs are exact: the published networks cost what was published. Budgets are read, and refused, by name."""

import gc
import pickle
import re
import weakref

import pytest
import timm
import torch
import torchvision
from helpers.models import TwoGroups
from timm.models.efficientnet import _gen_mobilenet_v2
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim import convert, cost, search, uniform_at
from timm_autoslim.costs.cost import UNITS, Cost, check_unit, cost_by_module
from timm_autoslim.errors import BudgetError, WidthError
from timm_autoslim.slimming.budgets import (
    Budget,
    parse_budget,
    parse_limits,
    read_budgets,
    uniform_within,
    widest_within,
    within_reach,
)

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

WIDE = {  # with the number of convolutions in the whole network's last layer but one
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
    found = supernet.space.channels(widths)
    assert {path: found[path] for path in modules} == {**wanted, classifier: 1000}
    assert cost(supernet, widths).macs == published - channels[-2] * POOLED
    assert sum(cost_by_module(supernet, widths).values()) == published - channels[-2] * POOLED


@pytest.mark.parametrize("library", WIDE)
@pytest.mark.parametrize(
    ("channels", "published"),
    [(MOBILENET_V2_207M, 206_861_128), (MOBILENET_V2_305M, 305_166_496)],
    ids=["207M", "305M"],
)
def test_published_mobilenet_v2(library, channels, published):
    model = on_meta(WIDE[library])
    assert_published(model, mobilenet_v2_modules(model), channels, published)


@pytest.mark.parametrize("library", RESNET50)
@pytest.mark.parametrize(
    ("channels", "published"), [(RESNET50_570M, 570_087_056), (RESNET50_2G, 2_006_144_224)], ids=["570M", "2G"]
)
def test_published_resnet50(library, channels, published):
    model = on_meta(RESNET50[library])
    assert_published(model, resnet50_modules(model), channels, published)


@pytest.mark.parametrize(
    ("build", "macs", "params"),
    [
        (torchvision.models.mobilenet_v2, 300_774_272, 3_504_872),
        (lambda: timm.create_model("mobilenetv2_100"), 300_774_272, 3_504_872),
        (torchvision.models.resnet50, 4_089_184_256, 25_557_032),
        (lambda: timm.create_model("resnet50"), 4_089_184_256, 25_557_032),
    ],
    ids=["torchvision/mobilenet_v2", "timm/mobilenetv2_100", "torchvision/resnet50", "timm/resnet50"],
)
def test_whole_networks(build, macs, params):
    assert cost(convert(on_meta(build))) == Cost(macs, params)


# -- a network small enough to count by hand --------------------------------------------------------------------------


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


def test_without_widths_the_cost_is_that_of_the_whole(supernet):
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


def test_a_kept_cost_holds_no_supernet():
    supernet = convert(TwoGroups(32), torch.zeros(1, 3, 8, 8))
    found = cost(supernet, supernet.space.uniform(0.5), batch_size=2)
    peak, kept = found.peak_bytes, search(supernet, ["peak_bytes<=60%"], lambda subnet: 1.0)
    again = pickle.loads(pickle.dumps(found))
    assert (again, again.peak_bytes) == (found, peak)
    assert len(pickle.dumps(kept)) < 4000
    with pytest.raises(BudgetError, match=r"this cost is kept without latency_ms; call cost\(supernet"):
        _ = again.latency_ms
    network, alive = kept.networks[0], weakref.ref(supernet)
    assert network.cost.peak_bytes == cost(supernet, network.widths).peak_bytes <= network.budget
    del supernet, found
    gc.collect()
    assert alive() is None


# -- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [(300e6, 300e6), (5, 5), ("300M", 300e6), ("1.2G", 1.2e9), ("12k", 12e3), ("12K", 12e3), ("60%", 600), (" 7 ", 7),
     ("12.5%", 125), ("3e5", 3e5),
     ("20Ki", 20480), ("1.5Mi", 1572864), ("1Gi", 2**30)],
)  # fmt: skip
def test_budgets_are_read(text, number):
    assert parse_budget(text, 1000) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("text", ["", "M", "%", "three", "300MB", "2B", "3 000", None, [3], True])
def test_a_budget_that_is_no_number_is_refused(text):
    with pytest.raises(
        BudgetError, match=re.escape(f'got the budget {text!r}; needed: a number, "300M", "1.2G" or "60%"')
    ):
        parse_budget(text, 1000)


@pytest.mark.parametrize("text", [0, -3, "0%", "-3M", "inf", float("nan")])
def test_a_budget_must_be_positive(text):
    with pytest.raises(BudgetError, match=re.escape(f"got the budget {text!r}; needed: a positive number")):
        parse_budget(text, 1000)


def test_units_are_what_a_cost_has():
    assert [check_unit(unit) for unit in UNITS] == ["macs", "params", "peak_bytes", "latency_ms"]
    with pytest.raises(BudgetError, match=re.escape(f"got a budget in 'flops'; needed: one of {list(UNITS)}")):
        check_unit("flops")


def test_a_budget_out_of_reach_is_refused_with_what_the_narrowest_reaches(supernet):
    narrowest = cost(supernet, supernet.space.min())
    assert within_reach(supernet, Budget((("macs", narrowest.macs),))) == supernet.space.min()
    message = (
        rf"the budget of {narrowest.params - 1:,} params is out of reach: the narrowest subnet of the search space has "
        rf"{narrowest.params:,} \(\d+\.\d% of the whole\); raise the budget, or lower `min` in convert\(\)"
    )
    with pytest.raises(BudgetError, match=message):
        within_reach(supernet, Budget((("params", narrowest.params - 1),)))
    with pytest.raises(BudgetError, match="out of reach"):
        uniform_at(supernet, "params", narrowest.params - 1)


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("budget", ["95%", "50%", "25%", "12%"])
def test_uniform_at_is_the_widest_uniform_network_within_the_budget(supernet, unit, budget):
    space, whole = supernet.space, cost(supernet)
    number = parse_budget(budget, getattr(whole, unit))
    widths = uniform_at(supernet, unit, budget)
    assert getattr(cost(supernet, widths), unit) <= number
    ratios = [i / 640 for i in range(1, 641)]
    within = [w for w in (space.uniform(r, exact=True) for r in ratios) if getattr(cost(supernet, w), unit) <= number]
    assert cost(supernet, widths).macs == max(cost(supernet, w).macs for w in within)
    assert abs(widths["stem"] / 32 - widths["inner"] / 64) <= 1 / 32


def test_uniform_at_of_the_whole_and_of_more_is_the_whole(supernet):
    assert uniform_at(supernet, "macs", "100%") == supernet.space.max()
    assert uniform_at(supernet, "params", 1e12) == supernet.space.max()


def test_uniform_at_refuses_malformed_budgets(supernet):
    with pytest.raises(BudgetError, match="got a budget in 'latency'"):
        uniform_at(supernet, "latency", "50%")
    with pytest.raises(BudgetError, match="got the budget 'half'"):
        uniform_at(supernet, "macs", "half")


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("macs<=300", {"macs": 300}),
        ("macs <= 60% and params<=2k", {"macs": 600, "params": 2000}),
        ("params<=1.5M   and  macs<=12.5%", {"params": 1.5e6, "macs": 125}),
    ],
)
def test_several_limits_are_read(text, limits):
    assert dict(parse_limits(text, Cost(1000, 10**6)).limits) == pytest.approx(limits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got the budget ''; needed: a text of UNIT<=AMOUNT joined by `and`, such as"),
        ("50%", "got the budget '50%'; needed: a text of UNIT<=AMOUNT"),
        ("macs>=5", "got the budget 'macs>=5'; needed: a text of UNIT<=AMOUNT"),
        ("macs<=5 and", "needed: a text of UNIT<=AMOUNT|got the budget '5 and'"),
        ("macs<=5 and 7", "got the budget 'macs<=5 and 7'; needed: a text of UNIT<=AMOUNT"),
        ("macs<=5, params<=7", "got the budget '5, params<=7'; needed: a number"),
        ("flops<=5", "got a budget in 'flops'; needed: one of ['macs', 'params', 'peak_bytes', 'latency_ms']"),
        ("macs<=", "got the budget ''; needed: a number"),
        ("macs<=-3", "got the budget '-3'; needed: a positive number"),
        ("macs<=5 and macs<=7", "got the budget 'macs<=5 and macs<=7', which limits macs twice"),
    ],
)
def test_malformed_limits_are_refused(text, message):
    with pytest.raises(BudgetError, match="|".join(re.escape(m) for m in message.split("|"))):
        parse_limits(text, Cost(1000, 10**6))


def test_a_budget_holds_where_all_its_limits_do():
    budget = Budget((("macs", 100.0), ("params", 10.0)))
    assert budget.holds(Cost(100, 10))
    assert budget.exceeded(Cost(100, 11)) == (("params", 10.0),)
    assert budget.exceeded(Cost(101, 11)) == budget.limits
    assert not budget.holds(Cost(101, 1))
    assert budget.tightest(Cost(50, 6)) == ("params", 10.0)
    assert budget.used(Cost(50, 6)) == 0.6
    assert budget.used(Cost(200, 6)) == 2


def test_budgets_come_in_the_order_of_a_descent(supernet):
    whole = cost(supernet)
    found = read_budgets(supernet, ["macs<=90% and params<=30%", "macs<=40%", "params<=60%"])
    assert [dict(b.limits) for b in found] == [
        {"params": 0.6 * whole.params},
        {"macs": 0.4 * whole.macs},
        {"macs": 0.9 * whole.macs, "params": 0.3 * whole.params},
    ]


@pytest.mark.parametrize("text", ["macs<=40% and params<=50%", "macs<=60% and params<=30%"])
def test_the_uniform_network_meets_all_limits(supernet, text):
    budget = parse_limits(text, cost(supernet))
    widths = uniform_within(supernet, budget)
    alone = [uniform_at(supernet, unit, limit) for unit, limit in budget.limits]
    assert widths == min(alone, key=lambda w: w.values_)
    assert budget.holds(cost(supernet, widths))


@pytest.mark.parametrize("share", ["100%", "52.3%", "30%"])
def test_the_widest_width_within_a_budget(supernet, share):
    budget = parse_limits(f"params<={share}", cost(supernet))
    start = supernet.space.from_dict({"stem": 7, "inner": 6})
    for name, size in {"stem": 32, "inner": 64}.items():
        fitting = [w for w in range(start[name], size + 1) if budget.holds(cost(supernet, start.replaced(name, w)))]
        assert widest_within(supernet, start, name, budget) == start.replaced(name, fitting[-1])
        chosen = [w for w in fitting if w in supernet.space[name].choices]
        aligned = start.replaced(name, chosen[-1]) if chosen else start
        assert widest_within(supernet, start, name, budget, exact=False) == aligned
    # no group is narrowed, not even where nothing fits
    whole = supernet.space.max()
    assert widest_within(supernet, whole, "stem", budget) == whole


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 96}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
        ("xcit_nano_12_p16_224", {"depth": 2}),
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
