"""What a model looks like beside its weights, as a value: drawn, written as JSON, and compared with a later model."""

import copy
import functools
import json
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from timm_autoslim.artifact.outline import Outline, join_changes
from timm_autoslim.errors import ArtifactError


class Net(nn.Module):
    """Layers with settings of all kinds."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.drop, self.path, self.up = nn.Dropout(0.1), nn.Identity(), nn.Upsample(scale_factor=(2.0, 2.0))
        self.head, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.head.weight
        self.scale, self.heads, self.residual, self.mode = 0.5, 2, True, "mean"
        self.function, self.counter, self.limit = F.gelu, 0, float("-inf")
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.of_closure, self.of_closures = scale_by(2), functools.partial(scale_by(scale_by(2)), 1.0)
        self._power, self._seen = 2.0, 0
        self.weight_init_mode, self.learning_rate, self.created, self.sizes = "normal", 0.1, "Monday", [3, 4]
        self.calls, self.drop_rate, self.file_name = 0, 0.1, "net.pt"
        self.grad_checkpointing = False
        self.register_buffer("table", torch.ones(8))

    def forward(self, x):
        self.calls += 1
        self._seen = len(x)
        x = self.of_closure(x * self.scale / self.heads) ** self._power
        return self.read(x) if self.residual and self.mode == "mean" else x.clamp(self.limit)

    def read(self, x):
        return self.partial(self.function(x)) if self.of_closures else x

    def reset(self):
        """No forward calls it."""
        nn.init.constant_(self.head.weight, self.learning_rate)


def scale_by(factor):
    return lambda x, bias=0.0: factor * x + bias


def draw(model):
    return Outline.draw(model, ["table"], ["conv.out_channels"], ["calls"])


def assign(path, name, value):
    return lambda net: setattr(net.get_submodule(path), name, value)


CHANGES = {
    "class": (assign("", "act", nn.ReLU()), "act is: ReLU, and was: LeakyReLU"),
    "to identity": (assign("", "act", nn.Identity()), "act is: Identity, and was: LeakyReLU"),
    "from identity": (assign("", "path", nn.ReLU()), "path is new: ReLU"),
    "gone": (lambda net: delattr(net, "act"), "act is gone, and was: LeakyReLU"),
    "slope": (assign("act", "negative_slope", 0.2), "act.negative_slope is 0.2, and was 0.1"),
    "eps": (assign("norm", "eps", 0.1), "norm.eps is 0.1, and was 1e-05"),
    "stride": (assign("conv", "stride", (2, 2)), "conv.stride is (2, 2), and was (1, 1)"),
    "groups": (assign("conv", "groups", 2), "conv.groups is 2, and was 1"),
    "padding mode": (assign("conv", "padding_mode", "circular"), "conv.padding_mode is circular, and was zeros"),
    "list of floats": (assign("up", "scale_factor", (3.0, 2.0)), "up.scale_factor is (3.0, 2.0), and was (2.0, 2.0)"),
    "float": (assign("", "scale", 1.0), "scale is 1.0, and was 0.5"),
    "integer": (assign("", "heads", 4), "heads is 4, and was 2"),
    "flag": (assign("", "residual", False), "residual is False, and was True"),
    "text": (assign("", "mode", "sum"), "mode is sum, and was mean"),
    "infinity": (assign("", "limit", -1.0), "limit is -1.0, and was -inf"),
    "function": (assign("", "function", F.relu), "function is relu(), and was gelu()"),
    "partial": (assign("", "partial", F.relu), "partial is relu(), and was leaky_relu(negative_slope=0.1)"),
    "keyword of a partial": (
        assign("", "partial", functools.partial(F.leaky_relu, negative_slope=0.2)),
        "partial is leaky_relu(negative_slope=0.2), and was leaky_relu(negative_slope=0.1)",
    ),
    "constant in a closure": (
        assign("", "of_closure", scale_by(3)),
        "of_closure is <lambda>(bias=0.0, factor=3), and was <lambda>(bias=0.0, factor=2)",
    ),
    "constant in a closure in a closure": (
        assign("", "of_closures", functools.partial(scale_by(scale_by(3)), 1.0)),
        "of_closures is <lambda>(0=1.0, bias=0.0, factor=<lambda>(bias=0.0, factor=3)), and was <lambda>(0=1.0, ",
    ),
    "private": (assign("", "_power", 3.0), "_power is 3.0, and was 2.0"),
    "hook": (
        lambda net: net.conv.register_forward_hook(scale_by(2)),
        "conv is: Conv2d with 1 forward hook (<lambda>(bias=0.0, factor=2)), and was: Conv2d",
    ),
    "hook before": (
        lambda net: net.path.register_forward_pre_hook(lambda *_: None), "path is new: Identity with 1 forward hook"
    ),
    "forward": (assign("conv", "forward", F.relu), "conv is: Conv2d with a forward of its own (relu), and was: Conv2d"),
    "shape": (assign("head", "bias", nn.Parameter(torch.ones(9))), "head.bias has the shape (9,), and had (8,)"),
    "buffer": (assign("", "table", torch.ones(9)), "table has the shape (9,), and had (8,)"),
    "tie": (assign("tied", "weight", nn.Parameter(torch.ones(8, 8))), "tied.weight is not tied, and was tied to head"),
    "attribute": (assign("conv", "out_channels", 9), "conv.out_channels is 9, and was 8"),
    "parametrization": (lambda net: parametrizations.weight_norm(net.conv), "conv is: ParametrizedConv2d, and was"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_told(change):
    net, (apply, message) = Net(), CHANGES[change]
    outline = draw(net)
    assert not [*outline.list_differences(copy.deepcopy(net))]
    apply(net)
    assert message in "; ".join(outline.list_differences(net))


def wrap_forward(net):
    """As mixed precision does."""
    forward = net.forward
    net.forward = functools.wraps(forward)(lambda *args: forward(*args))


ALLOWED = {
    "weights": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "type": lambda net: net.double(),
    "mode": lambda net: net.eval().requires_grad_(False),
    "rate of a dropout": assign("drop", "p", 0.5),
    "another dropout": assign("", "drop", nn.Dropout2d()),
    "a dropout for none": assign("", "path", nn.Dropout()),
    "none for a dropout": assign("", "drop", nn.Identity()),
    "a new dropout": assign("conv", "more", nn.Dropout()),
    "momentum": assign("norm", "momentum", 0.01),
    "in place": assign("act", "inplace", True),
    "a rate": assign("", "drop_rate", 0.5),
    "a note": assign("", "file_name", "other.pt"),
    "a counter": assign("", "counter", 7),
    "what the forward writes": lambda net: net(torch.ones(1)),
    "what is new": assign("", "epoch", 3),
    "a text that no code mentions": assign("", "weight_init_mode", "uniform"),
    "a date": assign("", "created", "Tuesday"),
    "a number that only other methods read": assign("", "learning_rate", 0.2),
    "a list that no code mentions": assign("", "sizes", [5, 6]),
    "what the forward writes to a private attribute": assign("", "_seen", 9),
    "gradient checkpointing": assign("", "grad_checkpointing", True),
    "several processes": nn.SyncBatchNorm.convert_sync_batchnorm,
    "a wrapped forward": wrap_forward,
    "compilation": lambda net: setattr(net, "_compiled_call_impl", net.forward),
}


@pytest.mark.parametrize("change", ALLOWED)
def test_what_serves_training_alone_is_no_change(change):
    net = Net()
    outline = draw(net)
    ALLOWED[change](net)
    assert not [*outline.list_differences(net)]


def test_an_attribute_that_a_model_lacks_is_no_difference_and_for_a_supernet_a_change():
    net = Net()
    outline = draw(net)
    del net.scale, net.conv.stride
    assert not [*outline.list_differences(net)]
    assert [*outline.list_changes(net)] == ["conv.stride is gone, and was (1, 1)"]


def test_an_outline_goes_through_json_and_comes_back_equal():
    outline = draw(Net())
    data = json.loads(json.dumps(outline.to_dict(), allow_nan=False))
    assert Outline.parse(data) == outline == pickle.loads(pickle.dumps(outline))
    assert not [*Outline.parse(data).list_differences(Net())]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, 3), (None, {}), ("written", [3]), ("written", "all"), ("modules", {"conv": 3}), ("settings", [1]),
        ("shapes", {"a": 3}), ("settings", {"a": {}}), ("ties", {"a": ["b"]}), ("more", {}),
    ],
)  # fmt: skip
def test_other_json_is_refused(key, value):
    data = value if key is None else {**draw(Net()).to_dict(), key: value}
    with pytest.raises(ArtifactError, match=r"outline '.*save the model again"):
        Outline.parse(data)


def test_only_the_first_changes_are_named_and_long_ones_are_cut():
    assert join_changes([]) == ""
    assert join_changes(["a", "b", "c", "d", "e"]) == "a; b; c and 2 more"
    assert re.fullmatch(r"x{200}\.\.\.", join_changes(["x" * 999]))


class Reading(Net):
    """Reads an attribute in a way that a test gives."""

    def forward(self, x):
        return read(self, x)


def read(net, x):
    return net.helper(net, x)


class Helper:
    def __call__(self, net, x):
        return x * net.learning_rate


WAYS = {
    "a function that the forward calls": lambda net: setattr(net, "helper", lambda net, x: x * net.learning_rate),
    "an object": lambda net: setattr(net, "helper", Helper()),
    "a hook": lambda net: net.act.register_forward_hook(lambda module, args, out: out * net.learning_rate),
    "a name that is made": lambda net: setattr(net, "helper", lambda net, x: x * getattr(net, "learning" + "_rate")),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_attribute_that_code_may_read_in_any_way_is_a_setting(way):
    net = Reading()
    WAYS[way](net)
    outline = draw(net)
    net.learning_rate = 0.2
    assert [*outline.list_differences(net)] == ["learning_rate is 0.2, and was 0.1"]


class Same(nn.Conv2d):
    """A convolution of one's own, whose code mentions nothing of torch's."""

    def forward(self, x):
        return super().forward(x)


def test_what_the_code_of_torch_reads_of_a_class_is_a_setting():
    net = nn.Sequential(Same(3, 8, 3))
    outline = Outline.draw(net, [], [])
    net[0].padding_mode = "circular"
    assert [*outline.list_differences(net)] == ["0.padding_mode is circular, and was zeros"]
