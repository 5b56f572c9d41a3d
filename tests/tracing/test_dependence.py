"""Branches whose results are dropped are named; all that outputs or the model's state depend on is not."""

import warnings

import pytest
import torch
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert, inspect
from timm_autoslim.tracing.dependence import Dependence

IMAGE = torch.zeros(1, 3, 8, 8)


class Heads(nn.Module):
    """A trunk with two heads, of which `choose` returns something."""

    def __init__(self, choose, aux=None):
        super().__init__()
        self.trunk, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.cls, self.choose = nn.Conv2d(8, 4, 1), choose
        self.aux = aux or nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.register_buffer("queue", torch.zeros(6))
        self.flag = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = self.bn(self.trunk(x)).relu()
        return self.choose(self, {"cls": self.cls(x), "aux": self.aux(x)})


def write_in_place(model, out):
    total = torch.zeros_like(out["aux"])
    total[:, :3] = out["aux"][:, :3]
    return out["cls"], total.flatten(1).sum(1)


def write_in_lists(model, out):
    total = torch.zeros(out["aux"].shape)
    torch._foreach_add_([total], [out["aux"]])
    return out["cls"], total.flatten(1).sum(1)


def write_queue(model, out):
    model.queue.copy_(out["aux"].mean((0, 2, 3)))
    return out["cls"]


def keep(model, out):
    model.last = out["aux"]
    return out["cls"]


LIVE = {
    "both": lambda model, out: out,
    "a list": lambda model, out: [out["cls"], [out["aux"]]],
    "in training alone": lambda model, out: out if model.training else out["cls"],
    "written in place": write_in_place,
    "written in lists": write_in_lists,
    "a buffer": write_queue,
    "an attribute": keep,
    "a view": lambda model, out: (out["cls"], out["aux"].transpose(0, 1)[1:].reshape(-1)),
}


@pytest.mark.parametrize("name", LIVE)
def test_what_is_used_is_not_named(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        supernet = convert(randomise(Heads(LIVE[name])), IMAGE)
    assert supernet.graph.dropped == ()
    assert "no output" not in str(supernet.space)


@pytest.mark.parametrize(
    "aux",
    [
        None,
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.LayerNorm(5)),
        nn.Sequential(nn.Flatten(2), nn.LSTM(64, 5)),
    ],
    ids=["convolutions", "linear", "LSTM"],
)
def test_a_head_whose_output_is_dropped_is_named(aux):
    text = (
        r"^no output depends on \d+% of the parameters \(aux\), though forward runs them: delete these modules before"
    )
    model = randomise(Heads(lambda model, out: out["cls"], aux))
    with pytest.warns(UserWarning, match=text):
        supernet = convert(model, IMAGE)
    assert supernet.graph.dropped == ("aux",)
    assert "(aux), though forward runs them" in str(supernet.space)
    with pytest.warns(UserWarning, match=text):
        assert any("though forward runs them" in advice for advice in inspect(model, IMAGE).advice)


def test_a_weight_that_the_code_reads_as_a_number_is_used():
    def choose(model, out):
        return out["cls"] * float(model.flag), out["aux"]

    assert convert(Heads(choose), IMAGE).graph.dropped == ()


def test_a_shared_layer_is_used():
    model = Heads(lambda model, out: out["cls"])
    model.aux = nn.Sequential(nn.ReLU(), model.cls)
    assert convert(model, IMAGE).graph.dropped == ()


def test_a_tensor_without_memory_is_told_from_others():
    dependence = Dependence()
    weight, sparse, out = torch.ones(2), torch.eye(2).to_sparse(), torch.ones(3)
    dependence.note([weight], [sparse])
    dependence.note([sparse], [out])
    assert dependence.list_live([out], [], [weight]) == {id(weight)}
    assert dependence.list_live([], [], [weight]) == set()
