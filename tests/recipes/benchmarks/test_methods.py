"""Methods of slim models are called and compared with their base: a small version of the benchmark, and its table."""

import json

import pytest
import torch
from helpers.recipes import RECIPES, launch
from torch import nn

from timm_autoslim.recipes.benchmarks import methods
from timm_autoslim.recipes.benchmarks.lib.methods import Call, Outcome, compare, is_narrower, list_calls, run_call


class Model(nn.Module):
    """A model with methods of several kinds."""

    def __init__(self, width=8, fused_width=None):
        super().__init__()
        self.conv, self.fused_width = nn.Conv2d(3, width, 1), fused_width or width

    def forward(self, x):
        return self.conv(x).mean((2, 3))

    def fuse(self):
        conv = nn.Conv2d(3, self.fused_width, 1)
        conv.load_state_dict(self.conv.state_dict())
        self.conv = conv

    def forward_features(self, x):
        return {"map": self.conv(x), "names": {"conv"}}

    def needs_more(self, more):
        raise AssertionError

    def _hidden(self):
        raise AssertionError


IMAGES = torch.randn(2, 3, 4, 4)


def test_methods_that_can_be_called_are_listed():
    calls = [str(call) for call in list_calls(nn.Sequential(Model()))]
    assert calls == ["reparameterize_model()", "0.fuse()"]
    assert "forward_features(images)" in [str(call) for call in list_calls(Model())]


def test_a_slim_model_that_does_the_same_is_right():
    for call in list_calls(Model()):
        assert compare(run_call(Model(), call, IMAGES), run_call(Model(4), call, IMAGES)) == ""


def test_what_is_wrong_is_told():
    call = Call("", "fuse")
    base = run_call(Model(), call, IMAGES)
    assert base.facts["change"] == 0
    assert compare(base, run_call(Model(4, fused_width=8), call, IMAGES)).startswith("RuntimeError")
    assert compare(run_call(Model(4, fused_width=8), call, IMAGES), base) == ""  # where the base raises
    assert compare(Outcome("", [1]), Outcome("", [1, 2])).startswith("returns")
    assert compare(base, Outcome("", None, base.outputs, {**base.facts, "change": 1.0})).startswith("moves the outputs")
    assert compare(base, Outcome("", None, base.outputs, {**base.facts, "tensors": 9})) == "tensors: 9, of the base 2"


def test_shapes_may_only_be_narrower():
    base = {"shape": [2, 8], "finite": True}
    assert is_narrower(base, {"shape": [2, 4], "finite": True})
    assert not is_narrower(base, {"shape": [2, 16], "finite": True})
    assert not is_narrower(base, {"shape": [2, 4], "finite": False})
    assert not is_narrower({"a": base}, {"b": base})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "fastvit_t8", "gemma4_vit_167m_enc"])
def test_methods_of_slim_models_do_what_those_of_their_bases_do(name):
    row = methods.measure(name)
    assert row["faults"] == {}
    assert row["methods"] > 8


@pytest.mark.slow
def test_a_run_goes_on_and_writes_its_table(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    page.write_text("<!-- methods -->\n<!-- /methods -->\n")
    row = {
        "name": "test_vit",
        "family": "X",
        "methods": 3,
        "calls": 4,
        "raising": {},
        "faults": {"extracted: f()": "g"},
    }
    results.write_text(json.dumps(row) + "\n")
    arguments = ["--models", "test_vit", "--results", results, "--table", page]
    done = launch(str(RECIPES / "benchmarks" / "methods.py"), *map(str, arguments))
    assert done.returncode == 0, done.stderr
    assert "| 1 | 3 | 4 | 0 | 1 |" in page.read_text()
    assert "| test_vit | extracted: f() | | | g |" in page.read_text()
