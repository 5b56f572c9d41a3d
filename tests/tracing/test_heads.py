"""Attention: which axis of heads shrinks, scales that follow the width, tables and caches that depend on it."""

import pytest
import timm
import torch
from helpers.comparisons import check_fused, equal
from helpers.models import randomise
from torch import nn

import timm_autoslim
from timm_autoslim.artifact.apply import apply_spec
from timm_autoslim.errors import WidthError
from timm_autoslim.supernet.order import reorder_channels


def small(name="test_vit", **arguments):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=10, **arguments)).eval()


def test_heads_lose_channels_and_their_scale_follows():
    supernet = timm_autoslim.convert(small(depth=2))
    before = supernet.model.blocks[0].attn
    attention = supernet.extract(supernet.space.uniform(0.5, exact=True)).blocks[0].attn
    assert (attention.num_heads, attention.head_dim) == (before.num_heads, before.head_dim // 2)
    assert attention.scale == attention.head_dim**-0.5


def test_whole_heads_go_where_the_user_wants_it():
    supernet = timm_autoslim.convert(small(depth=2), whole_heads="blocks.1.attn")
    narrow = supernet.extract(supernet.space.from_dict({g.name: max(1, g.size // 2) for g in supernet.space.groups}))
    first, second = narrow.blocks[0].attn, narrow.blocks[1].attn
    before = supernet.model.blocks[0].attn
    assert (first.num_heads, first.head_dim) == (before.num_heads, before.head_dim // 2)
    assert (second.num_heads, second.head_dim) == (before.num_heads // 2, before.head_dim)
    assert second.scale == before.scale
    with pytest.raises(
        WidthError,
        match=r"whole_heads: got a glob .*no_such.* that matches no such module; needed: globs of modules that split",
    ):
        timm_autoslim.convert(small(depth=2), whole_heads=["blocks.*.attn", "no_such"])


def test_a_stale_scale_would_be_noticed():
    supernet = timm_autoslim.convert(small(depth=2))
    slim = supernet.extract(supernet.space.min()).double()
    images = torch.randn(2, 3, 160, 160).double()
    with torch.no_grad():
        check_fused(slim, images, 1e-9)
        for block in slim.blocks:
            block.attn.fused_attn, block.attn.scale = True, supernet.model.blocks[0].attn.scale
        with pytest.raises(AssertionError):
            check_fused(slim, images, 1e-9)


@pytest.mark.parametrize("tokens", [16, 9])
def test_as_many_tokens_as_channels_of_a_head_do_not_hold_the_scale(tokens):
    """A scale is recognised by its value, and tokens can be as many as the channels of a head."""
    model = small("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3, img_size=64 if tokens == 16 else 48,
                  class_token=False, global_pool="avg")  # fmt: skip
    supernet = timm_autoslim.convert(model)
    assert model.blocks[0].attn.head_dim == 16
    attention = supernet.extract(supernet.space.uniform(0.5, exact=True)).blocks[0].attn
    assert attention.head_dim == 8
    assert attention.scale == 8**-0.5


@pytest.mark.slow
def test_rotary_tables_that_a_module_renews_keep_their_size_and_heads_go():
    model = small("eva02_tiny_patch14_224", depth=2, img_size=56)
    supernet = timm_autoslim.convert(model)
    narrow = supernet.extract(supernet.space.from_dict({g.name: max(1, g.size // 2) for g in supernet.space.groups}))
    assert narrow.rope.pos_embed.shape == model.rope.pos_embed.shape
    assert narrow.blocks[0].attn.num_heads < model.blocks[0].attn.num_heads
    assert ("rope.pos_embed", 1) in supernet.graph.fixed
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():  # bfloat16 makes the module compute its bands anew
        assert narrow.bfloat16()(images.bfloat16()).isfinite().all()


class Halves(nn.Module):
    """Two convolutions whose outputs, one after the other, are scaled by a table that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(16, 4)
        self.register_buffer("table", torch.arange(1.0, 17.0), persistent=False)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], 1).mean((2, 3))
        return self.head(x * self.table)


def test_a_spec_names_the_channels_of_an_unsaved_table_that_stay():
    model, images = Halves().eval(), torch.randn(2, 3, 4, 4)
    supernet = timm_autoslim.convert(model, images)
    spec = supernet.extract(supernet.space.from_dict({"left": 3, "right": 5})).autoslim
    assert spec.sizes["table"] == (((0, 3), (8, 5)),)
    assert spec.sizes["head.weight"] == (None, 8)
    again = apply_spec(Halves(), spec)
    assert again.table.tolist() == [1, 2, 3, 9, 10, 11, 12, 13]
    ordered = timm_autoslim.convert(model, images, "l1")  # sorting would part the table from its channels
    assert torch.equal(ordered.model.table, model.table)
    assert torch.equal(ordered.model.left.weight, model.left.weight)


def test_slimming_twice_composes_what_stays_of_an_unsaved_table():
    images = torch.randn(2, 3, 4, 4)
    first = timm_autoslim.convert(Halves().eval(), images)
    once = first.extract(first.space.from_dict({"left": 3, "right": 5}))
    second = timm_autoslim.convert(once, images)
    twice = second.extract(second.space.from_dict({"left": 2, "right": 4}))
    assert twice.autoslim.sizes["table"] == (((0, 2), (8, 4)),)
    assert torch.equal(apply_spec(Halves(), twice.autoslim).table, twice.table)


class Cached(nn.Module):
    """A bias that is gathered once in eval mode and kept, as LeViT keeps its attention biases."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.rand(8))
        self.cache = {}

    def forward(self, x):
        if self.training:
            self.cache = {}
        bias = self.cache.get("bias")
        if bias is None:
            bias = self.bias * 2
            if not self.training:
                self.cache["bias"] = bias
        return self.head(self.stem(x).mean((2, 3)) + bias)


@torch.no_grad()
def test_what_a_module_caches_at_one_width_serves_no_other():
    model, images = Cached().eval(), torch.randn(2, 3, 4, 4)
    expected = model(images)
    supernet = timm_autoslim.convert(model, images)
    cached = model.cache["bias"]
    for widths in (supernet.space.from_dict({"stem": 3}), supernet.space.from_dict({"stem": 5})):
        slim = supernet.extract(widths)
        assert torch.equal(supernet(images, widths), slim(images))
        assert len(slim.cache["bias"]) == widths["stem"]
    assert model.cache["bias"] is cached
    assert torch.equal(supernet(images), expected)
    assert torch.allclose(reorder_channels(model, supernet.graph, "random")(images), expected, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_flat_kernels_shrink_on_both_sides():
    model = small("efficientnet_cc_b0_4e")
    images = torch.randn(2, 3, 64, 64)
    supernet = timm_autoslim.convert(model, images)
    widths = supernet.space.uniform(0.5)
    slim = supernet.extract(widths)
    assert equal(supernet(images, widths), slim(images))
    layer, before = slim.blocks[4][1].conv_dw, model.blocks[4][1].conv_dw
    assert layer.weight.shape[1] == layer.out_channels * 25 < before.weight.shape[1]
    layer = slim.blocks[4][1].conv_pwl
    assert layer.weight.shape[1] == layer.out_channels * layer.in_channels
    assert timm_autoslim.cost(supernet, widths).params == sum(p.numel() for p in slim.parameters())
    moved = reorder_channels(model.double(), supernet.graph, "random")
    assert (moved(images.double()) - model(images.double())).abs().max() < 1e-9
