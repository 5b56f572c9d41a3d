"""What a forward keeps for its next call, as a video model its last frame's features: another width cannot take it."""

import pytest
import torch
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import ModelChangedError


class Video(nn.Module):
    """Adds the features of the frame before, and notes how many images it has seen."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)
        self.register_buffer("before", None, persistent=False)
        self.scores = None

    def forward(self, x):
        x = self.first(x)
        if self.before is not None:
            x = x + self.before
        self.before = x.detach()
        out = self.last(x).mean((2, 3))
        self.scores = out.detach() if self.scores is None else self.scores + out.detach()
        return out


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.video, self.head = Video(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.video(x))


@pytest.mark.parametrize(("kind", "path"), [(Video, "before"), (Inside, "video.before")])
def test_a_subnet_says_what_the_widest_has_kept(kind, path):
    images = torch.randn(2, 3, 8, 8)
    supernet = convert(kind().eval(), images)
    widths = supernet.space.uniform(0.5)
    first = supernet(images, widths)
    supernet(images)
    with pytest.raises(ModelChangedError, match=rf"model\.{path} of the shape \(2, 32, 8, 8\)\).*size of tensor"):
        supernet(images, widths)
    with (
        supernet.at(widths),
        pytest.raises(ModelChangedError, match="put it back to what the constructor sets, such as None"),
    ):
        supernet(images)
    video = supernet.model.get_submodule(path.rpartition(".")[0])
    video.before = video.scores = None
    assert torch.equal(supernet(images, widths), first)


def test_other_errors_stay_as_they_are():
    images = torch.randn(2, 3, 8, 8)
    supernet = convert(Video().eval(), images)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        supernet(images[:, :2], supernet.space.uniform(0.5))


def test_a_narrower_extracted_model_starts_without_what_does_not_fit_it():
    images = torch.randn(2, 3, 8, 8)
    supernet = convert(Video().eval(), images)
    widths = supernet.space.uniform(0.5)
    expected = supernet(images, widths)
    supernet(images)
    slim, widest = supernet.extract(widths), supernet.extract()
    assert slim.before is None
    assert torch.equal(slim.scores, supernet.model.scores)  # of the outputs, which keep their width
    assert torch.equal(widest.before, supernet.model.before)
    assert torch.equal(slim(images), expected)
