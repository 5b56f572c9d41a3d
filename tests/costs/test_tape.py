"""peak_bytes is what the allocator measures: from lifetimes that hand counts, the profiler and CUDA agree with."""

import copy

import numpy as np
import pytest
import timm
import torch
from helpers.marks import slow_but
from helpers.models import TwoGroups
from helpers.widths import arbitrary_widths
from helpers.zoo import Member
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from timm_autoslim import convert, cost
from timm_autoslim.costs.tape import Run, Tape, get_tape, record
from timm_autoslim.utils.tensors import named_tensors

SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3}


CNNS = [
    Member("timm", "resnet10t"),
    Member("timm", "mobilenetv2_050"),
    Member("timm", "efficientnet_b0"),
    Member("timm", "densenet121", arguments={"block_config": (3, 3, 2, 2)}),
    Member("timm", "convnext_atto", arguments={"depths": (1, 1, 2, 1)}),
    Member("torchvision", "shufflenet_v2_x0_5"),
]


TRANSFORMERS = [
    Member("timm", "vit_tiny_patch16_224", arguments={"img_size": 64, **SMALL}),
    Member("timm", "swin_tiny_patch4_window7_224", arguments={"img_size": 64, "depths": (1, 1, 1, 1)}),
    Member("timm", "convit_tiny", arguments={"img_size": 64, "depth": 2}),
]


WITHIN = 0.01  # workspace aside, both count the same storages


THIN = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::resize_")


def owners(event):
    """Return the operators that an allocation was made or freed for: the one above `aten::empty`, and convolutions.

    A convolution copies inputs and weights that do not lie as it needs them, by operators inside of it.
    """
    above = []
    while event.parent is not None:
        event = event.parent
        above.append(event)
    above = [e for e in above if e.name not in THIN]
    return {e.id for e in above[:1]} | {e.id for e in above if e.name == "aten::convolution"}


def weight_bytes(model):
    return sum(t.untyped_storage().nbytes() for t in named_tensors(model).values())


@torch.no_grad()
def profiled_peak(model, images):
    """Return what torch's profiler saw allocated at once, and weights and images; without workspace of kernels.

    Workspace is what one operator allocates and frees itself.
    """
    model(images)  # some modules keep what they make in their first run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as prof:
        model(images)
    waiting, events = list(prof.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append(event)
    events.sort(key=lambda event: event.start_time_ns)
    sizes, alive = [event.extra_fields.alloc_size for event in events], {}
    for i, event in enumerate(events):
        if sizes[i] > 0:
            alive[event.extra_fields.ptr] = i, owners(event)
        else:
            start, by = alive.pop(event.extra_fields.ptr, (i, set()))
            if by & owners(event):
                sizes[start] = sizes[i] = 0
    assert len(events) >= 10
    return int(np.cumsum(sizes).max()) + weight_bytes(model) + images.nbytes


@pytest.mark.parametrize("member", slow_but([CNNS[0], TRANSFORMERS[0]], CNNS + TRANSFORMERS), ids=str)
def test_the_peak_is_what_the_profiler_measures(member):
    model, images = member.build(), member.images()
    supernet = convert(model, images[:1])
    generator = torch.Generator().manual_seed(0)
    for widths in (supernet.space.max(), supernet.space.sample(generator), arbitrary_widths(supernet.space, generator)):
        model = supernet.extract(widths)
        assert cost(supernet, widths, batch_size=len(images)).peak_bytes == pytest.approx(
            profiled_peak(model, images), rel=WITHIN
        )


@pytest.mark.parametrize("member", [CNNS[1], TRANSFORMERS[0]], ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_is_what_cuda_measures(member):
    supernet = convert(member.build(), member.images()[:1])
    images = member.images().repeat(8, 1, 1, 1)
    widths = supernet.space.sample(torch.Generator().manual_seed(0))
    before = torch.cuda.memory_allocated()
    model, images = supernet.extract(widths).cuda(), images.cuda()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(images)
    measured = torch.cuda.max_memory_allocated() - before
    assert cost(supernet, widths, batch_size=len(images)).peak_bytes == pytest.approx(measured, rel=0.1)


class Holding(nn.Module):
    """A convolution whose output is viewed, changed in place and, if asked, kept by a name to the end."""

    def __init__(self, keep):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)
        self.keep = keep

    def forward(self, x):
        x = self.first(x)  # (N, 8, 8, 8)
        x = x.view(x.shape).relu_().mul_(2)  # shares storage, and takes none
        alias = x if self.keep else None
        x = self.second(x)
        x = self.second(x) if not self.keep else x + 1
        del alias
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keep", [False, True])
def test_lifetimes_by_hand(keep, batch):
    supernet = convert(Holding(keep), torch.zeros(1, 3, 8, 8))
    width = 5
    widths = supernet.space.from_dict(dict.fromkeys(supernet.space.names, width))
    model = supernet.extract(widths)
    maps = batch * width * 64 * 4
    # two maps at once: input and output of a convolution; a third where the first is kept
    want = weight_bytes(model) + batch * 3 * 64 * 4 + (3 if keep else 2) * maps
    assert cost(supernet, widths, batch_size=batch).peak_bytes == want


def test_batch_and_type():
    supernet = convert(TwoGroups(16), torch.zeros(1, 3, 8, 8))
    widths = supernet.space.uniform(0.5)
    one, four = (cost(supernet, widths, batch_size=n).peak_bytes for n in (1, 4))
    counters = 3 * 8  # num_batches_tracked
    weights = weight_bytes(supernet.extract(widths))
    assert four - weights == 4 * (one - weights)
    assert cost(supernet, widths, dtype=torch.float16).peak_bytes - counters == (one - counters) / 2
    assert cost(supernet, widths, dtype=torch.float64).peak_bytes - counters == (one - counters) * 2


class InAList(TwoGroups):
    """TwoGroups whose images come in a list, in a dict."""

    def forward(self, inputs):
        return super().forward(inputs["images"][0])


def test_the_type_is_that_of_inputs_in_any_nesting():
    torch.manual_seed(0)
    example = torch.zeros(1, 3, 8, 8)
    nested = cost(convert(InAList(), ({"images": [example]},)), dtype=torch.float16)
    assert nested.peak_bytes == cost(convert(TwoGroups(), example), dtype=torch.float16).peak_bytes


class Attention(nn.Module):
    """Attention of two heads over tokens (N, L, 16), with projections of its own for queries, keys and values."""

    def __init__(self, masked):
        super().__init__()
        self.register_buffer("mask", torch.zeros(64, 64) if masked else None)
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_no_fused_kernel_takes_makes_the_scores(masked):
    supernet = convert(Attention(masked).eval(), torch.zeros(1, 64, 16))
    assert sorted(supernet.space.names) == ["q", "v"]
    tokens, peaks = torch.randn(2, 64, 16), []
    for width in (16, 8):
        widths = supernet.space.max().replace("v", width)
        peaks.append(cost(supernet, widths, batch_size=2).peak_bytes)
        assert peaks[-1] == pytest.approx(profiled_peak(supernet.extract(widths), tokens), rel=WITHIN)
    assert peaks[1] > 2 * peaks[0]


@pytest.mark.parametrize("name", slow_but(["test_vit"], ["test_vit", "test_convnext", "shvit_s1"]))
def test_the_tape_tells_every_size_at_every_width(name):  # shvit splits by differences
    """What it says at widths that it was not made from is what a run at these widths does."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    size = (3, 64, 64) if name == "shvit_s1" else model.pretrained_cfg["input_size"]
    example = torch.empty(1, *size, device="meta")
    supernet = convert(model, example)
    tape = get_tape(supernet)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        values = supernet.space.sample(generator).values_
        run = record(model, example, supernet.graph, values)
        told = Run(tape.operators_at(values), [])
        assert [(o.name, o.path) for o in run.operators] == [(o.name, o.path) for o in told.operators]
        assert run.numbers()[0] == told.numbers()[0]
        assert run.peak() == tape.peak_bytes(values) - tape.constant_bytes(values)


def test_a_tape_is_the_same_inside_a_block():
    supernet, other = (convert(TwoGroups(), torch.zeros(1, 3, 8, 8)) for _ in range(2))
    with supernet.at(supernet.space.min()):
        assert cost(supernet, batch_size=1) == cost(other, batch_size=1)


def test_a_tape_is_recorded_once_and_anew_where_something_changed():
    supernet = convert(TwoGroups(), torch.zeros(1, 3, 8, 8))
    tape = get_tape(supernet)
    assert get_tape(supernet) is tape is not get_tape(supernet, 2)
    assert get_tape(copy.deepcopy(supernet)) is not tape
    supernet.double()
    assert get_tape(supernet).constant_bytes((8, 16)) > 1.5 * tape.constant_bytes((8, 16))
    graph = supernet.graph
    supernet.graph = graph.freeze_tensors(["inner.weight"], "for this test")
    assert get_tape(supernet).graph is supernet.graph
    supernet.graph = graph
    assert get_tape(supernet).graph is graph


def test_a_tape_that_cannot_be_made_says_why():
    class Deeper(TwoGroups):
        def forward(self, x):
            x = self.bn(self.stem(x)).relu()
            scale = {True: torch.mul, False: torch.true_divide}[str(x.shape[1]) == "8"]
            x = scale(x, 1)  # another operator where it is narrower
            return self.head(x.mean((2, 3)))

    supernet = convert(Deeper(), torch.zeros(1, 3, 8, 8))
    assert cost(supernet).macs > 0
    with pytest.raises(ValueError, match="narrower subnets run other operators than the widest, so peak_bytes"):
        Tape(supernet.model, supernet.example(), supernet.graph)
