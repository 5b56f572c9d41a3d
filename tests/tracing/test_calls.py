"""Where sizes enter a trace."""

import torch
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert, load, save
from timm_autoslim.tracing.calls import FunctionCall, wrap_attributes
from timm_autoslim.tracing.origins import FromAttribute
from timm_autoslim.tracing.sizes import Size


def test_wrapping_reaches_integers_alone_or_in_sequences_and_nothing_else():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.flag, self.scale, self.name = 4, True, 0.5, "layer"
            self.pair, self.parts, self.mixed, self.empty = (1, 2), [3, 4], (1, 2.0), ()
            self._hidden = 7

    model = nn.Sequential(nn.Sequential(Layer()))
    model.depth = 2
    wrap_attributes(model)
    layer = model[0][0]
    assert model.depth.origin == FromAttribute("depth")
    assert layer.width.origin == FromAttribute("0.0.width")
    assert [s.origin.path for s in layer.pair] == ["0.0.pair.0", "0.0.pair.1"]
    assert [s.origin.path for s in layer.parts] == ["0.0.parts.0", "0.0.parts.1"]
    assert type(layer.pair) is tuple
    assert type(layer.parts) is list
    assert layer.flag is True
    assert [type(v) for v in (layer.scale, layer.name, layer._hidden, layer.mixed[0])] == [float, str, int, int]
    assert layer.empty == ()


def test_a_call_finds_the_sizes_that_it_was_given():
    width = Size(8, FromAttribute("width"))
    call = FunctionCall("view", (2, (width, 3), True), {"dim": width})
    assert call.find_size(8) is width
    assert type(call.find_size(3)) is int
    assert call.find_sizes([8, 3])[0] is width
    assert call.find_sizes([8, 4]) is None


class Splitting(nn.Module):
    """Splits channels into heads of a literal size, as a layer of einops does: it keeps its sizes twice."""

    def __init__(self, **sizes):
        super().__init__()
        self.sizes, self._sizes = sizes, tuple(sizes.items())

    def __getstate__(self):
        return self.sizes

    def __setstate__(self, sizes):
        self.__init__(**sizes)

    def forward(self, x):
        ((name, size),) = self._sizes
        other = x.shape[2] // size
        return x.view(*x.shape[:2], *((size, other) if name == "heads" else (other, size))).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 1), nn.Linear(24, 5)
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.split, self.split_keys = Splitting(heads=3), Splitting(size=8)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.split(self.q(x)), self.split_keys(self.k(x)), self.split_keys(self.v(x))
        scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
        return self.head(self.out((scores @ v).transpose(1, 2).flatten(2)).mean(1))


def test_sizes_that_a_layer_keeps_twice_follow_together(tmp_path):
    model = randomise(Attention()).eval()
    images = torch.randn(2, 3, 4, 4)
    supernet = convert(model, images[:1])
    assert supernet.space.max().to_dict() == {"stem": 24, "q": 8, "out": 24}
    widths = supernet.space.from_dict({"stem": 20, "q": 5, "out": 7})
    slim = supernet.extract(widths)
    assert (slim.split_keys.sizes, slim.split_keys._sizes) == ({"size": 5}, (("size", 5),))
    assert (slim.split.sizes, model.split_keys._sizes) == ({"heads": 3}, (("size", 8),))
    save(slim, tmp_path / "slim")
    with torch.no_grad():
        assert torch.equal(supernet(images), model(images))
        assert torch.equal(supernet(images, widths), slim(images))
        assert torch.equal(load(tmp_path / "slim", Attention()).eval()(images), slim(images))
