"""Outputs of every form keep their channels, or may shrink; modules inside may take and return dicts."""

import collections
import dataclasses
import types

import pytest
import torch
from helpers.conversions import IMAGE, Net, assert_untouched, check_conversion, list_tensors, make_images, read_state
from helpers.models import randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_autoslim import convert
from timm_autoslim.errors import TraceError, WidthError

Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    maps: object = None


class Slots:
    __slots__ = ("logits", "maps")

    def __init__(self, logits, maps):
        self.logits, self.maps = logits, maps


class Slot:
    __slots__ = "both"

    def __init__(self, *both):
        self.both = both


class Recursive(Result):
    """It holds itself."""

    def __init__(self, logits, maps):
        super().__init__(logits, maps)
        self.me = None


OUTPUTS = {
    "dict": lambda maps, logits: {"maps": maps, "logits": logits},
    "list": lambda maps, logits: [logits, maps],
    "tuple": lambda maps, logits: (logits, None, maps, 3),
    "named tuple": lambda maps, logits: Pair(maps, logits),
    "dataclass": lambda maps, logits: Result(logits, maps),
    "object with slots": lambda maps, logits: Slots(logits, maps),
    "object with one slot": lambda maps, logits: Slot(logits, maps),
    "deque": lambda maps, logits: collections.deque([maps, logits]),
    "nested dict": lambda maps, logits: {"out": {"maps": maps, "none": None}, "logits": [logits]},
    "list of dicts": lambda maps, logits: [{"maps": maps}, {"logits": logits}],
    "dataclass in a dict": lambda maps, logits: {"out": Result(logits, [maps])},
    "namespace": lambda maps, logits: types.SimpleNamespace(logits=logits, maps=(maps, "name")),
}


def with_output(form, **layers):
    def body(self, x):
        maps = self.maps(x)
        return form(maps, self.logits(maps))

    return randomise(Net(body, **layers))


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_keeps_its_channels(name):
    supernet = check_conversion(with_output(OUTPUTS[name]))
    assert supernet.space.names == ("inner",)
    assert supernet.graph.fixed["stem.weight", 0] == "an output of the model"


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_may_shrink_where_the_user_says_so(name):
    supernet = check_conversion(with_output(OUTPUTS[name]), keep_output=False)
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16, "head": 10}


@pytest.mark.parametrize(
    ("form", "logits"),
    [
        (lambda maps, logits: {"maps": maps, "logits": logits}, "logits"),
        (lambda maps, logits: {"maps": maps, "scores": {"logits": logits}}, "scores"),
        (lambda maps, logits: {"maps": maps, "class_logits": logits}, ["*_logits"]),
        (lambda maps, logits: (maps, logits), "1"),
        (lambda maps, logits: [[maps], [logits, maps.mean()]], ["1.0", "1.1"]),
        (lambda maps, logits: types.SimpleNamespace(maps=maps, logits=logits), ("logits",)),
    ],
)
def test_outputs_that_are_named_keep_their_channels(form, logits):
    supernet = check_conversion(with_output(form), keep_output=logits)
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}


@pytest.mark.parametrize(
    ("form", "remedy"),
    [
        (lambda maps, logits: {"maps": maps, "logits": logits}, r"the closest are \['logits'\]"),
        (lambda maps, logits: logits, "the only output has no name"),
    ],
)
def test_a_name_of_no_output_is_refused(form, remedy):
    with pytest.raises(WidthError, match=rf"keep_output: got a glob \('logit'\) that matches no output.*{remedy}"):
        convert(with_output(form), IMAGE, keep_output="logit")


def test_an_output_that_holds_itself_ends():
    def form(maps, logits):
        out = Recursive(logits, maps)
        out.me = out
        return out

    assert convert(with_output(form), IMAGE).space.names == ("inner",)


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (lambda maps, logits: None, "NoneType"),
        (lambda maps, logits: (t for t in (maps, logits)), "generator"),
        (lambda maps, logits: {"shape": maps.shape}, "dict"),
    ],
)
def test_a_forward_that_returns_no_tensor_is_refused(form, kind):
    model = with_output(form)
    before = read_state(model)
    with pytest.raises(TraceError, match=f"^the model: got a {kind} without a tensor from its forward in eval.*needed"):
        convert(model, IMAGE)
    assert_untouched(before, model)


class Inner(nn.Module):
    """Takes a dict by name and returns one, so that nothing passes by position."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, *, features):
        return {"y": {"z": self.conv(input=features["x"])}}


def test_modules_that_take_and_return_dicts_are_followed_and_say_how_wide_they_are():
    model = Net(lambda s, x: s.logits(s.part(features={"x": s.maps(x)})["y"]["z"]), part=Inner())
    supernet = check_conversion(randomise(model))
    assert supernet.space.names == ("stem", "inner", "part.conv")
    extracted = supernet.extract(supernet.space.from_dict({"stem": 3, "inner": 5, "part.conv": 2}))
    assert str(extracted.part.conv) == "Conv2d(3, 2, kernel_size=(1, 1), stride=(1, 1))"


@pytest.mark.parametrize("name", ["nested dict", "dataclass", "object with slots"])
def test_reentrant_checkpoints_serve_outputs_of_every_form(name):
    def run(self, x, compute):
        maps = compute(self.maps, x.requires_grad_())
        return OUTPUTS[name](maps.detach(), self.logits(maps))

    gradients = []
    for compute in (lambda f, x: checkpoint(f, x, use_reentrant=True), lambda f, x: f(x)):
        torch.manual_seed(0)
        supernet = convert(randomise(Net(lambda s, x, c=compute: run(s, x, c))), IMAGE)
        out = list_tensors(supernet(make_images(), supernet.space.min()))
        sum(tensor.square().mean() for tensor in out if tensor.requires_grad).backward()
        gradients.append([parameter.grad for parameter in supernet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
