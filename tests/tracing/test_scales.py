"""Numbers that multiply attention scores: scales follow the channels of a head in every spelling, others stay."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from helpers.models import randomise
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert
from timm_autoslim.costs.inspection import inspect
from timm_autoslim.tracing.scales import AttributeFloat

IMAGES = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
DIM, HEADS, HEAD = 32, 2, 16


class Scaled(nn.Module):
    """Scores divided by a temperature, in a module of their own."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, q, k):
        return torch.matmul(q / self.temperature, k.transpose(2, 3))


class Attention(nn.Module):
    """Attention whose scores a function computes from queries and keys (N, heads, L, head_dim)."""

    def __init__(self, scores, **attributes):
        super().__init__()
        self.scores, self.num_heads, self.head_dim = scores, HEADS, HEAD
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        for name, value in attributes.items():
            if name.startswith("buffer"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = (f(x).view(n, length, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = self.scores(self, q, k)
        attention = out if out.shape == q.shape else out.softmax(-1) @ v
        return self.proj(attention.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, scores, **attributes):
        super().__init__()
        self.stem, self.attn, self.head = nn.Conv2d(3, DIM, 1), Attention(scores, **attributes), nn.Linear(DIM, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attn(x)).mean(1))


def make(scores, **attributes):
    torch.manual_seed(0)
    return randomise(Model(scores, **attributes)).eval()


def product(q, k):
    return q @ k.transpose(-1, -2)


def in_place(s, q, k):
    q *= s.scale
    return product(q, k)


def by_einsum(s, q, k):
    return torch.einsum("bhnd,bhmd->bhnm", q, k).mul_(s.scale)


def by_baddbmm(s, q, k):
    mask = torch.zeros(1, q.shape[2], q.shape[2], device=q.device)
    return torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=s.scale).unflatten(
        0, q.shape[:2]
    )


def rotated(s, q, k):
    q, table = q * s.scale, torch.ones(q.shape[-1], device=q.device)
    return product(q * table - q * 0 * table, k)


# Spellings of one network: its scores are divided by the root of the channels of a head.
ROOT = HEAD**0.5
SPELLINGS = {
    "scale": (lambda s, q, k: product(q * s.scale, k), {"scale": HEAD**-0.5}),
    "before the projections are split": (lambda s, q, k: product(q, k * s.scale), {"scale": HEAD**-0.5}),
    "divisor": (lambda s, q, k: product(q, k).div(s.coefficient), {"coefficient": ROOT}),
    "divisor after a bias": (lambda s, q, k: (torch.zeros(1, device=q.device) + product(q, k)) / s.t, {"t": ROOT}),
    "quarter": (lambda s, q, k: product(q * s.qs, k * s.qs), {"qs": HEAD**-0.25}),
    "two quarters": (lambda s, q, k: product(q / s.a, s.b * k), {"a": HEAD**0.25, "b": HEAD**-0.25}),
    "root of an attribute": (lambda s, q, k: product(q, k) * s.variance**-0.5, {"variance": float(HEAD)}),
    "inverse of an attribute": (lambda s, q, k: product(q, k) * (1 / s.t), {"t": ROOT}),
    "multiple of an attribute": (lambda s, q, k: product(q, k) * (s.twice / 2), {"twice": 2 * HEAD**-0.5}),
    "numpy": (lambda s, q, k: product(q, k) / s.t, {"t": np.sqrt(HEAD)}),
    "module": (lambda s, q, k: s.scaled(q, k), {"scaled": Scaled(ROOT)}),
    "tensor": (lambda s, q, k: product(q, k) / s.t.to(q.device), {"t": torch.sqrt(torch.tensor(float(HEAD)))}),
    "buffer": (lambda s, q, k: product(q, k) * s.buffer, {"buffer": torch.tensor(HEAD**-0.5)}),
    "buffer in place": (lambda s, q, k: product(q, k).mul_(s.buffer.sqrt()), {"buffer": torch.tensor(1 / HEAD)}),
    "buffer of a number a head": (
        lambda s, q, k: product(q, k) * s.buffer, {"buffer": torch.full((HEADS, 1, 1), HEAD**-0.5)}
    ),
    "sdpa": (lambda s, q, k: F.scaled_dot_product_attention(q, k, k), {}),
    "sdpa scale": (lambda s, q, k: F.scaled_dot_product_attention(q, k, k, scale=s.scale), {"scale": 0.25}),
    "size": (lambda s, q, k: product(q, k) / math.sqrt(k.size(-1)), {}),
    "size of an attribute": (lambda s, q, k: product(q, k) * s.head_dim**-0.5, {}),
    "in place": (in_place, {"scale": HEAD**-0.5}),
    "einsum": (by_einsum, {"scale": HEAD**-0.5}),
    "baddbmm": (by_baddbmm, {"scale": HEAD**-0.5}),
    "rotated": (rotated, {"scale": HEAD**-0.5}),
    "after a mask": (
        lambda s, q, k: product(q, k).masked_fill(torch.zeros(1, dtype=torch.bool, device=q.device), -1.0) * s.scale,
        {"scale": HEAD**-0.5},
    ),
}  # fmt: skip


def divide(s, q, k):
    return product(q, k) / k.shape[-1] ** 0.5


def attend_keys(s, q, k):
    return divide(s, q, k).softmax(-1) @ k


QUICK = [
    "scale", "divisor", "two quarters", "root of an attribute", "module", "buffer in place", "sdpa",
    "size of an attribute", "einsum", "rotated", "after a mask",
]  # fmt: skip


@pytest.mark.parametrize("name", slow_but(QUICK, SPELLINGS))
def test_a_scale_follows_in_every_spelling(name):
    scores, attributes = SPELLINGS[name]
    model, expected = make(scores, **attributes), make(attend_keys if "sdpa" in name else divide)
    expected.load_state_dict(model.state_dict(), strict=False)
    supernet, other = convert(model, IMAGES), convert(expected, IMAGES)
    assert supernet.space.max() == other.space.max()
    assert supernet.space["attn.q"].size == HEAD
    assert not supernet.repairs
    assert not supernet.constants
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), expected(IMAGES), atol=1e-5)
        for ratio in (0.5, 0.25):
            widths = supernet.space.uniform(ratio, exact=True)
            assert torch.equal(supernet(IMAGES, widths), supernet.extract(widths).eval()(IMAGES))
            assert torch.allclose(
                supernet(IMAGES, widths), other(IMAGES, other.space.uniform(ratio, exact=True)), atol=1e-5
            )


# Numbers that are no scale of these scores, or not alone, though some are 16 ** -0.5.
CONSTANTS = {
    "residual weight": (lambda s, q, k: s.scale * product(q, k), {"scale": 0.25, "weight": 0.25}),
    "negative slope": (lambda s, q, k: F.leaky_relu(product(q, k) * s.scale, s.slope), {"scale": 0.25, "slope": 0.25}),
    "dropout": (lambda s, q, k: F.dropout(product(q, k) * s.scale, s.drop, s.training), {"scale": 0.25, "drop": 0.25}),
    "after softmax": (lambda s, q, k: (product(q, k) * s.scale).softmax(-1) * s.mix, {"scale": 0.25, "mix": 0.25}),
    "a bias": (lambda s, q, k: product(q, k) * s.scale + s.shift, {"scale": 0.25, "shift": 0.25}),
    "another branch": (
        lambda s, q, k: product(q, k) * s.scale + s.res_scale * q.sum(-1, keepdim=True),
        {"scale": 0.25, "res_scale": 0.25},
    ),
    "input of a linear layer": (
        lambda s, q, k: product(q, k) * s.scale + s.q(s.gain * q.transpose(1, 2).flatten(2)).mean(),
        {"scale": 0.25, "gain": DIM**-0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANTS)
def test_other_numbers_stay(name):
    scores, attributes = CONSTANTS[name]
    supernet = convert(make(scores, **attributes), IMAGES)
    attention = supernet.extract(supernet.space.uniform(0.5, exact=True)).attn
    for attribute, value in attributes.items():
        assert getattr(attention, attribute) == (8**-0.5 if attribute == "scale" else value)
    assert not supernet.repairs
    assert not supernet.constants


class Single(nn.Module):
    """Attention of one head of 16 channels, so that no entire head can go."""

    def __init__(self, scores):
        super().__init__()
        self.stem, self.q, self.k, self.v = nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 24)
        self.scores, self.head = scores, nn.Linear(24, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.scores(self, self.q(x), self.k(x)).softmax(-1) @ self.v(x))


TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def multiply_by(number):
    return lambda s, q, k: product(q, k) * number


def test_a_scale_that_cannot_follow_holds_its_channels_with_the_reason():
    supernet = convert(Single(multiply_by(0.25)), TOKENS)  # a number that the function keeps for itself
    reason = "the model: in a subnet, attention scores over 8 of 16 channels are still multiplied by 0.25"
    assert supernet.graph.fixed["q.weight", 0] == supernet.graph.fixed["k.weight", 0] == reason
    assert supernet.repairs == (reason,)
    assert supernet.space.max().to_dict() == {"stem": 32, "v": 24}
    heads = convert(make(multiply_by(0.25)), IMAGES)  # of which entire ones can go, that keep their channels
    assert heads.space["attn.q"].size == HEADS
    assert not heads.repairs


@pytest.mark.parametrize(
    "number",
    [
        lambda: torch.rsqrt(torch.tensor(16.0)),
        lambda: torch.full((1,), 16.0).sqrt().reciprocal(),
        lambda: torch.from_numpy(np.full((), 0.25, np.float32)),
    ],
)
def test_a_scale_that_is_a_tensor_of_a_number_in_the_code_holds_its_channels(number):
    supernet = convert(Single(lambda s, q, k: product(q, k) * number().to(q.device)), TOKENS)
    assert supernet.space.max().to_dict() == {"stem": 32, "v": 24}
    assert "still multiplied by 0.25" in supernet.graph.fixed["q.weight", 0]


def test_a_scale_that_is_a_tensor_of_the_size_follows():
    supernet = convert(Single(lambda s, q, k: product(q, k) * torch.tensor(float(q.shape[-1])).rsqrt()), TOKENS)
    assert supernet.space.max().to_dict() == {"stem": 32, "q": 16, "v": 24}


class Config:
    scale = 0.25


def test_a_scale_of_a_class_a_config_or_a_frozen_parameter_holds_its_channels():
    class OnClass(Single):
        scale = 0.25

    frozen = Single(lambda s, q, k: product(q, k) * s.scale)
    frozen.scale = nn.Parameter(torch.tensor(0.25), requires_grad=False)
    in_config = Single(lambda s, q, k: product(q * s.config.scale, k))
    in_config.config = Config()
    shared = Single(lambda s, q, k: product(q, k) * s.stem.scale)
    shared.register_buffer("scale", torch.tensor(0.25))
    shared.stem.register_buffer("scale", shared.scale)
    for model in (frozen, in_config, OnClass(lambda s, q, k: product(q, k) * s.scale), shared):
        supernet = convert(model, TOKENS)
        assert supernet.space.max().to_dict() == {"stem": 32, "v": 24}
        assert "still multiplied by 0.25" in supernet.graph.fixed["q.weight", 0]


def test_a_buffer_without_data_holds_its_channels():
    model = Single(lambda s, q, k: product(q, k) * s.factor)
    model.register_buffer("factor", torch.tensor(0.25))
    supernet = convert(model.to("meta"), TOKENS)
    assert supernet.space.max().to_dict() == {"stem": 32, "v": 24}
    assert supernet.graph.fixed["k.weight", 0].startswith("factor: it multiplies attention scores, and has no data")


@pytest.mark.parametrize("number", [0.3, 2.0, 0.2500003])
def test_numbers_that_are_no_power_of_the_channels_stay_and_are_listed(number):
    supernet = convert(Single(multiply_by(number)), TOKENS)
    assert supernet.space.max().to_dict() == {"stem": 32, "q": 16, "v": 24}
    assert supernet.constants == (f"the model: a number multiplies attention scores over 16 channels by {number:.6g}",)
    model = Single(lambda s, q, k: product(q, k) / s.temperature)
    model.temperature = 1 / number
    supernet = convert(model, TOKENS)
    assert supernet.constants == (f"temperature multiplies attention scores over 16 channels by {number:.6g}",)
    assert supernet.extract(supernet.space.min()).temperature == 1 / number


def test_a_temperature_that_is_learned_is_a_weight():
    model = Single(lambda s, q, k: product(q, k) * s.temperature)
    model.temperature = nn.Parameter(torch.tensor(0.25))
    supernet = convert(model, TOKENS)
    assert supernet.space.max().to_dict() == {"stem": 32, "q": 16, "v": 24}
    assert supernet.extract(supernet.space.min()).temperature == 0.25
    assert not supernet.constants


def test_a_buffer_follows_in_training_copies_and_checkpoints():
    model = Single(lambda s, q, k: product(q, k) * s.factor).eval()
    model.register_buffer("factor", torch.tensor(0.25))
    supernet = convert(model, TOKENS)
    widths = supernet.space.from_dict({**supernet.space.max().to_dict(), "q": 4})
    slim = supernet.extract(widths)
    assert slim.factor == 0.5
    assert slim.state_dict()["factor"] == 0.5
    assert model.factor == supernet.model.factor == 0.25
    assert "factor" not in slim.autoslim.attributes  # a checkpoint holds it
    supernet(TOKENS, widths).sum().backward()
    assert model.q.weight.grad[:4].abs().sum() > 0
    assert torch.equal(supernet.double()(TOKENS.double(), widths), supernet.extract(widths)(TOKENS.double()))


def test_attention_between_channels_has_a_scale_of_its_rows():
    """As DaViT's: scores over tokens relate channels to each other, and are scaled by the number of channels."""

    def relate(s, q, k):
        return (k.transpose(1, 2) @ (q * s.scale)).softmax(-1) @ q.transpose(1, 2)

    class Channels(Single):
        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(self.scores(self, self.q(x), self.k(x)).transpose(1, 2))

    model = Channels(relate)
    model.scale, model.head = 0.25, nn.Linear(16, 3)
    supernet = convert(model, TOKENS)
    assert supernet.extract(supernet.space.from_dict({**supernet.space.max().to_dict(), "k": 4})).scale == 0.5


def test_arithmetic_with_a_number_keeps_its_path():
    number = AttributeFloat(0.25, "attn.scale")
    for value, power in ((number * 2, 1), (2 * number, 1), (number / 2, 1), (1 / number, -1), (number**-0.5, -0.5)):
        assert (value.path, value.power) == ("attn.scale", power)
    assert (1 / number**0.5, (1 / number**0.5).power) == (2.0, -0.5)
    assert [type(v) for v in (number + 1, number * number, -number, copy.deepcopy(number))] == [float] * 4
    assert type(pickle.loads(pickle.dumps(number))) is float


def test_inspect_says_which_numbers_stay():
    assert "numbers that stay" not in str(inspect(make(multiply_by(0.25))))
    line = "attn: a number multiplies attention scores over 16 channels by 2"
    text = str(inspect(make(multiply_by(2.0)).to("meta")))
    assert f"numbers that stay as they are at all widths:\n  {line}" in text
