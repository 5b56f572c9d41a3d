"""Where sizes enter a trace."""

from torch import nn

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
