"""Networks of one stem, one head and a body between them that a test gives, as one function."""

import torch
from torch import nn

from helpers.models import randomise
from helpers.widths import arbitrary_widths
from timm_autoslim import convert, cost
from timm_autoslim.supernet.order import reorder_channels

IMAGE = torch.zeros(1, 3, 8, 8)
EXACT = 1e-10  # float64: rounding alone


def conv(fan_in, fan_out, kernel=1, **options):
    return nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, **options)


class Around(nn.Module):
    """A network around a body: a stem of 8 channels, what a test gives, and a head that reads `last` channels."""

    def __init__(self, body, last=8, **layers):
        super().__init__()
        self.stem = conv(3, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = conv(last, 5)
        self.body = body

    def forward(self, x):
        return self.head(self.body(self, self.stem(x))).mean((2, 3))


def convert_around(body, last=8, **layers):
    """Convert a network around `body`, check all that must hold of every conversion, and return the supernet."""
    model = randomise(Around(body, last, **layers)).eval()
    supernet = convert(model, IMAGE)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(supernet(images), model(images))
        for seed in range(4):
            widths = arbitrary_widths(supernet.space, torch.Generator().manual_seed(seed))
            slim = supernet.extract(widths)
            assert torch.equal(supernet(images, widths), slim(images))
            assert cost(supernet, widths).params == sum(p.numel() for p in slim.parameters())
        double = supernet.extract().double()
        permuted = reorder_channels(double, supernet.graph, "random")
        torch.testing.assert_close(permuted(images.double()), double(images.double()), rtol=EXACT, atol=EXACT)
    return supernet
