"""What a forward keeps for its next call, as a video model its last frame's features: another width cannot take it."""

from collections import deque

import pytest
import torch
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import ModelChangedError, NothingToSlimError


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


class Memory(nn.Module):
    """Adds the features of the last frames, and keeps a log of its outputs."""

    def __init__(self, frames):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)
        self.frames, self.log = frames, []

    def forward(self, x):
        self.frames.append(self.first(x).detach())
        if len(self.frames) > 3:
            self.frames.pop(0)
        out = self.last(self.first(x) + sum(self.frames)).mean((2, 3))
        self.log.append(out.detach())
        return out


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("frames", [list, lambda: deque(maxlen=2)], ids=["list", "deque"])
def test_a_memory_in_a_list_is_state_and_no_cache(frames, ran):
    model, images = Memory(frames()).eval(), torch.randn(1, 3, 8, 8)
    if ran:
        model(images)
    supernet = convert(model, images)
    assert supernet.space.max().to_dict() == {"first": 32}
    supernet(images)
    widths = supernet.space.uniform(0.5)
    with pytest.raises(ModelChangedError, match=r"model\.frames\[0\] of the shape \(1, 32, 8, 8\)"):
        supernet(images, widths)
    slim = supernet.extract(widths)
    assert not slim.frames
    model.frames.clear()
    assert torch.equal(supernet(images, widths), slim(images))


def test_what_a_growing_list_keeps_of_weights_is_a_cache():
    class Logging(Memory):
        def forward(self, x):
            self.log.append(self.first.weight.norm().detach())
            return self.last(self.first(x) * self.log[0]).mean((2, 3))

    with pytest.raises(NothingToSlimError, match=r"its forward keeps log\[0\], which it computes from first.weight"):
        convert(Logging([]).eval(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("batch", [1, 2])
def test_state_of_a_batch_does_not_reach_one_of_another_length(batch):
    images = torch.randn(batch, 3, 8, 8)
    supernet = convert(Video().eval(), images)
    assert supernet.space.max().to_dict() == {"first": 32}
    assert supernet.repairs == ()
    assert not supernet.takes_any_batch_size


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
