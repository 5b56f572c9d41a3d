"""Inputs of every form: tensors, tuples, dicts and objects; and examples that are refused."""

import collections
import dataclasses

import pytest
import torch
from helpers.conversions import IMAGE, Net, assert_untouched, check_conversion, make_images, read_state
from helpers.models import TwoGroups, randomise
from torch import nn

from timm_autoslim import convert, cost
from timm_autoslim.errors import TraceError, WidthError
from timm_autoslim.supernet.widths import Widths

Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Batch:
    picture: torch.Tensor
    scale: float


class Bag(dict):
    def picture(self):
        return self["x"]


def masked(self, x, mask=None, times=1, negative=False):
    x = x * times if mask is None else x * mask
    return self.logits(self.maps(-x if negative else x))


def table(self, x, table):
    return self.logits(self.maps(x) * table)


def words(self, x, ids):
    return self.logits(self.maps(x) + self.embed(ids).mean(1)[:, :, None, None])


X, Y = make_images(), make_images()
# the body, its example, and inputs with data; None, numbers and flags may differ from those of the example
INPUTS = {
    "a tuple": (lambda s, x, y: s.logits(s.maps(x + y)), (IMAGE, IMAGE), (X, Y)),
    "a dict": (lambda s, *, x, y: s.logits(s.maps(x + y)), {"x": IMAGE, "y": IMAGE}, {"x": X, "y": Y}),
    "an ordered dict": (
        lambda s, *, x, y: s.logits(s.maps(x + y)), collections.OrderedDict(x=IMAGE, y=IMAGE),
        {"x": X, "y": Y},
    ),
    "None, a number and a flag": (masked, (IMAGE, None, 2, True), (X, None, 3, False)),
    "None in a dict": (masked, {"x": IMAGE, "mask": None}, {"x": X, "mask": Y}),
    "nested tuples": (
        lambda s, pair: s.logits(s.maps(pair[0] + pair[1][0])), ((IMAGE, (IMAGE, 7)),), ((X, (Y, 7)),),
    ),
    "a list": (lambda s, pair: s.logits(s.maps(pair[0] + pair[1])), [IMAGE, IMAGE], ([X, Y],)),
    "a named tuple": (
        lambda s, pair: s.logits(s.maps(pair.first + pair.second)), (Pair(IMAGE, IMAGE),), (Pair(X, Y),),
    ),
    "a dict inside a tuple": (
        lambda s, batch: s.logits(s.maps(batch["x"] * batch["times"])), ({"x": IMAGE, "times": 2},),
        ({"x": X, "times": 3},),
    ),
    "a dict of another class": (
        lambda s, batch: s.logits(s.maps(batch.picture())), (Bag(x=IMAGE),), (Bag(x=X),)
    ),
    "a dataclass": (
        lambda s, batch: s.logits(s.maps(batch.picture * batch.scale)), Batch(IMAGE, 2.0), Batch(X, 3.0)
    ),
    "a tensor without dimensions": (table, (IMAGE, torch.zeros(())), (X, torch.tensor(2.0))),
    "a tensor that is no batch": (table, (IMAGE, torch.zeros(8, 8)), (X, make_images(8, 8))),
    "a scale first": (
        lambda s, scale, x: s.logits(s.maps(x * scale)), (torch.zeros(()), IMAGE), (torch.tensor(2.0), X)
    ),
    "words beside images": (
        words, (IMAGE, torch.zeros(1, 5, dtype=torch.long)), (X, torch.randint(0, 11, (2, 5))),
    ),
    "a larger batch": (table, (make_images(4, 3, 8, 8), torch.zeros(4, 1, 1, 1)), (X, make_images(2, 1, 1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_every_form_go_through(name):
    body, example, inputs = INPUTS[name]
    layers = {"embed": nn.Embedding(11, 8)} if body is words else {}
    supernet = check_conversion(randomise(Net(body, **layers)), example, inputs)
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}


def test_widths_may_follow_the_inputs_and_none_means_the_widest():
    calls = []

    def body(self, x, *further):
        calls.append((further, self.stem.out_channels))
        return self.logits(self.maps(x))

    one, two = convert(Net(body), IMAGE), convert(Net(body), (IMAGE, None))
    cases = {
        lambda: one(IMAGE): ((), 8),
        lambda: one(IMAGE, None): ((), 8),
        lambda: one(IMAGE, one.space.uniform(0.5)): ((), 4),
        lambda: two(IMAGE): ((), 8),
        lambda: two(IMAGE, None): ((None,), 8),
        lambda: two(IMAGE, None, None): ((None,), 8),
        lambda: two(IMAGE, None, two.space.uniform(0.5)): ((None,), 4),
        lambda: two(IMAGE, None, widths=two.space.uniform(0.5)): ((None,), 4),
    }
    for call, expected in cases.items():
        calls.clear()
        call()
        assert calls == [expected]


def test_widths_are_never_an_input_of_the_model():
    supernet = convert(TwoGroups(), IMAGE)
    other = convert(TwoGroups(16), IMAGE).space.max()
    assert isinstance(other, Widths)
    for call in (lambda: supernet(IMAGE, other), lambda: supernet(IMAGE, widths=other)):
        with pytest.raises(WidthError, match="got widths of another model"):
            call()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("image.png", "got a str without a tensor; needed: a tensor .N, C, H, W., or a tuple or dict of forward's"),
        ((1, 3, 8, 8), r"got a tuple without a tensor.*such as torch.zeros\(1, 3, 224, 224\)"),
        (IMAGE.numpy(), "got a ndarray without a tensor"),
        ({}, "got a dict without a tensor"),
        (torch.zeros(0, 3, 8, 8), r"got a tensor of the shape \(0, 3, 8, 8\), which is empty; needed: a tensor"),
        ((IMAGE, {"y": torch.zeros(1, 3, 0, 8)}), r"got a tensor of the shape \(1, 3, 0, 8\), which is empty"),
    ],
)
def test_an_example_without_data_to_run_on_is_refused(example, message):
    model = TwoGroups()
    before = read_state(model)
    with pytest.raises(TraceError, match=f"^example_input: {message}"):
        convert(model, example)
    assert_untouched(before, model)


@pytest.mark.parametrize(
    ("example", "shape"),
    [
        (torch.zeros(1, 4, 8, 8), ("stem", "2, 4, 8, 8")),
        (torch.zeros(3, 8, 8), ("bn", "8, 8, 8")),
        (torch.zeros(()), ("stem", "")),
    ],
    ids=["channels", "no batch", "no dimensions"],
)
def test_an_example_of_another_shape_names_the_first_module_that_fails(example, shape):
    model = TwoGroups()
    before = read_state(model)
    name, lengths = shape
    message = rf"^{name}: its forward raised .*given inputs of the shapes \[\({lengths}\)\]"
    with pytest.raises(TraceError, match=message):
        convert(model, example)
    assert_untouched(before, model)


class Frames(nn.Module):
    """Frames of clips, in one batch: four frames are a clip."""

    def __init__(self, per_clip=4):
        super().__init__()
        self.per_clip, self.stem, self.bn = per_clip, nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        clips = x.view(x.shape[0] // self.per_clip, self.per_clip, *x.shape[1:])
        x = (clips + clips.roll(1, 1)).view(x.shape)
        return self.head(self.inner(x).relu().mean((2, 3))).view(-1, self.per_clip, 5).mean(1)


def test_a_batch_of_frames_stays_a_multiple_of_the_examples():
    frames = make_images(8, 3, 8, 8)
    supernet = convert(randomise(Frames()).eval(), frames).eval()
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}
    widths = supernet.space.uniform(0.5)
    assert torch.equal(supernet(frames, widths), supernet.extract(widths).eval()(frames))
    one = convert(nn.Sequential(Frames().stem, nn.Conv2d(8, 16, 1)), IMAGE)
    assert cost(supernet).macs == cost(one).macs + 16 * 5  # of one frame
    assert cost(supernet, batch_size=8).peak_bytes > cost(supernet, batch_size=4).peak_bytes
    with pytest.raises(
        TraceError, match=r"^batch_size: got 6, with which the forward raises RuntimeError .*such as 8$"
    ):
        cost(supernet, batch_size=6)


class Image(nn.Module):
    """It takes one image (3, H, W), or a fixed number of views (6, 3, H, W)."""

    def __init__(self, dims):
        super().__init__()
        self.dims, self.stem, self.inner, self.head = dims, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        if x.dim() != self.dims or (self.dims == 4 and len(x) != 6):
            raise ValueError(tuple(x.shape))
        return self.head(self.inner(self.stem(x).relu()).relu().mean((-2, -1)))


@pytest.mark.parametrize("shape", [(3, 8, 8), (6, 3, 8, 8)], ids=["no batch", "six views"])
def test_an_example_of_one_length_is_taken_as_it_is(shape):
    images = make_images(*shape)
    supernet = convert(randomise(Image(len(shape))).eval(), images).eval()
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}
    widths = supernet.space.uniform(0.5)
    assert torch.equal(supernet(images, widths), supernet.extract(widths).eval()(images))
    assert supernet.example().shape == images.shape
    assert cost(supernet, batch_size=1).peak_bytes
    with pytest.raises(WidthError, match=r"^batch_size: got 7; needed: 1, which stands for the example"):
        cost(supernet, batch_size=7)


def test_inputs_that_the_forward_does_not_take_are_refused():
    for example, message in (((IMAGE, IMAGE), "positional"), ({"y": IMAGE}, "keyword argument 'y'")):
        with pytest.raises(TraceError, match=f"^the model: its forward raised TypeError.*{message}"):
            convert(TwoGroups(), example)
