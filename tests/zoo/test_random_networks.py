"""What must hold for every network, on networks that nobody has thought of: random blocks, channels and widths."""

import pytest
import torch
from helpers.blocks import tokens as token_blocks
from helpers.blocks.networks import BLOCKS, Network, variants
from helpers.comparisons import assert_same, snapshot
from helpers.models import randomise
from helpers.widths import arbitrary_widths
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim import convert, cost
from timm_autoslim.costs.cost import cost_by_module
from timm_autoslim.slicing.tensors import take_slice
from timm_autoslim.supernet.order import reorder_channels

EXACT = 1e-9  # float64: a permutation changes only the order of sums, a fused kernel that of all its arithmetic


def of_kind(kind, sizes):
    options = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in kind.options.items()})
    return st.tuples(st.just(kind), sizes, st.sampled_from(["batch", "group", "none"]), options)


def networks(kinds=BLOCKS, least=2, blocks=4):
    sizes = st.integers(least, 9)
    row = st.lists(st.sampled_from(kinds).flatmap(lambda kind: of_kind(kind, sizes)), max_size=blocks)
    return st.builds(Network, stem=sizes, blocks=row, hidden=st.sampled_from([0, 6]), side=st.sampled_from([8, 4]))


def images_for(model):
    return torch.randn(2, 3, model.side, model.side)


def converted(model, data):
    """Convert with or without whole heads."""
    whole_heads = "*" if model.has_heads and data.draw(st.booleans(), label="whole heads") else ()
    return convert(model, images_for(model)[:1], whole_heads=whole_heads)


def any_widths(supernet, data):
    """Draw for every group a width from the narrowest that the model can run with to its size."""
    drawn = {g.name: data.draw(st.integers(g.floor, g.size), label=g.name) for g in supernet.space.groups}
    return supernet.space.from_dict(drawn)


def count_macs(slim, images):
    """Count what runs: without the kernels that the counter does not know, of attention and of recurrent layers."""
    unfused, unrolled = sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False)
    with torch.enable_grad(), unfused, unrolled, FlopCounterMode(display=False) as counter:
        slim(images)
    return counter.get_total_flops() / 2 / len(images)


def split_variants(slow=()):
    """Return each block with its first variant, and once more with all others, which take long, as `slow` ones do."""
    for kind in BLOCKS:
        first, *rest = variants(kind)
        yield pytest.param(kind, [first], marks=[pytest.mark.slow] * (kind.__name__ in slow), id=kind.__name__)
        if rest:
            yield pytest.param(kind, rest, marks=pytest.mark.slow, id=f"{kind.__name__}, other variants")


def small(examples):
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow)


def assert_sliced_right(supernet, widths, images):
    """The widest is the model, a subnet is its extracted model and costs what that costs; channels can be permuted."""
    model = supernet.model
    out, before = model(images), snapshot(model)
    assert out.isfinite().all()
    assert torch.equal(supernet(images, supernet.space.max()), out)

    slim = supernet.extract(widths)
    assert torch.equal(supernet(images, widths), slim(images))
    spent = cost(supernet, widths)
    assert spent.params == sum(p.numel() for p in slim.parameters())
    assert spent.macs == count_macs(slim, images)
    assert torch.equal(model(images), out)
    assert_same(before, snapshot(model))

    double = supernet.extract().double()
    permuted = reorder_channels(double, supernet.graph, "random")
    torch.testing.assert_close(permuted(images.double()), double(images.double()), rtol=EXACT, atol=EXACT)


@pytest.mark.slow
@small(80)
@given(networks(), st.data())
@torch.no_grad()
def test_every_network_is_sliced_right(model, data):
    torch.manual_seed(0)
    before = snapshot(randomise(model).eval())
    supernet = converted(model, data)
    assert_same(before, snapshot(model))
    assert_sliced_right(supernet, any_widths(supernet, data), images_for(model))


@pytest.mark.parametrize(("kind", "some"), split_variants())
@torch.no_grad()
def test_every_block_is_sliced_right(kind, some):
    for options in some:
        model = randomise(Network(6, [(kind, 5, "batch", options)], 0, side=4)).eval()
        for whole_heads in ["", "*"] if model.has_heads else [""]:
            supernet = convert(model, images_for(model)[:1], whole_heads=whole_heads or ())
            assert_sliced_right(supernet, arbitrary_widths(supernet.space, None), images_for(model))


@pytest.mark.slow
@small(40)
@given(networks(), st.data())
def test_every_network_is_trained_right(model, data):
    """In training mode, a step through the supernet moves the kept weights as a step of the extracted model does."""
    torch.manual_seed(0)
    randomise(model).train()
    supernet, images = converted(model, data), images_for(model)
    widths = any_widths(supernet, data)
    slim = supernet.extract(widths)
    separate, shared = slim(images), supernet(images, widths)
    assert torch.equal(shared, separate)
    separate.square().mean().backward()
    shared.square().mean().backward()
    kept = supernet.graph.slices(widths.values_).tensors
    for name, parameter in slim.named_parameters():
        gradient = supernet.model.get_parameter(name).grad
        if parameter.grad is None:
            assert gradient is None, name
            continue
        axes = kept.get(name, (None,) * gradient.dim())
        assert torch.equal(take_slice(gradient, axes), parameter.grad), name
        assert gradient.count_nonzero() == parameter.grad.count_nonzero(), name


ATTENTION = [token_blocks.SelfAttention, token_blocks.CrossAttention]


@pytest.mark.slow
@small(25)
@given(networks(ATTENTION, blocks=2), st.data())
@torch.no_grad()
def test_at_every_width_fused_attention_is_what_its_parts_are(model, data):
    """The scale that a block was built with follows its narrower heads, of which the fused kernel takes it itself."""
    torch.manual_seed(0)
    randomise(model).eval()
    supernet, images = converted(model, data), images_for(model).double()
    slim = supernet.extract(any_widths(supernet, data)).double()
    outputs = []
    for fused in (True, False):
        for block in slim.blocks:
            block.fused = fused
        outputs.append(slim(images))
    torch.testing.assert_close(*outputs, rtol=EXACT, atol=EXACT)


@pytest.mark.slow
@small(30)
@given(networks(least=4))
def test_every_channel_of_every_network_can_be_slimmed(model):
    """Nothing but the input, the output and what is no channel may be fixed, nor may a conversion need a repair."""
    supernet = convert(model, images_for(model)[:1])
    allowed = (
        "a channel of the model's input", "an output of the model", "the size of a convolution kernel",
        "the channels inside a group stay, because entire groups are removed", "none of its axes carries channels",
    )  # fmt: skip
    if any(isinstance(m, torch.nn.GroupNorm) and m.num_groups > 1 for m in model.modules()):
        # where its groups cut the parts of a concatenation in two, the parts cannot shrink in step
        allowed += ("their number cannot shrink in step with the channels that they are tied to",)
    kept = {(f"blocks.{i}.{name}", axis) for i, block in enumerate(model.blocks) for name, axis in block.kept}
    fixed = {place: reason for place, reason in supernet.graph.fixed.items() if not reason.endswith(allowed)}
    assert not {place: reason for place, reason in fixed.items() if place not in kept}
    assert supernet.repairs == ()


@pytest.mark.parametrize(
    ("kind", "some"), split_variants(slow=("TorchEncoder", "TorchDecoder", "CrossAttention", "Windows"))
)
def test_every_block_narrows(kind, some):
    """At half width a block has about a quarter of its MACs, or about half where one side of its products is fixed."""
    for options in some:
        model = Network(16, [(kind, 16, "batch", options)], 0, side=4)
        for whole_heads in ["", "*"] if model.has_heads else [""]:
            supernet = convert(model, images_for(model)[:1], whole_heads=whole_heads or ())
            half = supernet.space.uniform(0.5, exact=True)
            before, after = cost_by_module(supernet), cost_by_module(supernet, half)
            inside = [path for path in before if path.startswith("blocks")]
            if inside:
                share = sum(after[path] for path in inside) / sum(before[path] for path in inside)
                assert share <= 0.45, (options, whole_heads, supernet.graph.fixed)
            else:  # it multiplies nothing: only the stem and the head are left
                assert cost(supernet, half).macs == cost(supernet).macs / 2, options
            assert supernet.repairs == (), (options, whole_heads)
