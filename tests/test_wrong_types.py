"""Arguments of the wrong type: every public function names the argument, or says what it needed."""

import contextlib

import numpy as np
import pytest
import torch
from helpers.models import CLASSES, TwoGroups
from torch import nn
from torch.nn.functional import cross_entropy

import timm_autoslim as ta
from timm_autoslim import AutoSlimError

IMAGE = torch.zeros(1, 3, 8, 8)
IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.arange(4)
LOGITS = torch.zeros(2, 3)

# What no argument below takes, but for those that are excepted.
VALUES = {
    "None": None,
    "number": 0.5,
    "negative": -1,
    "integer": 5,
    "bool": True,
    "text": "x",
    "bytes": b"x",
    "list": [1],
    "texts": ["x"],
    "dict": {"a": 1},
    "object": object(),
    "tensor": torch.zeros(2, 2),
    "array": np.zeros(3),
    "module": nn.Linear(2, 2),
    "function": abs,
    "class": int,
    "generator": torch.Generator(),
}
CALLABLE = {"module", "function", "class"}
NUMBER = {"number", "integer"}


@pytest.fixture(scope="module")
def supernet():
    return ta.convert(TwoGroups().train(), IMAGE)


def list_calls(supernet):
    """Return by name a function, its arguments, and for each argument that is tried the values that it takes."""
    space, widths = supernet.space, supernet.space.min()
    search = {"supernet": supernet, "budgets": {"macs": "90%"}, "evaluate": lambda subnet: 0.0}
    method = {**search, "method": "uniform"}
    step = {
        "model": supernet, "space": space, "inputs": IMAGES, "targets": LABELS, "loss_fn": cross_entropy,
        "generator": torch.Generator(), "n": 2,
    }  # fmt: skip
    team, result = ta.Team(), ta.baseline(**method)
    return {
        "convert": (
            ta.convert,
            {"model": TwoGroups(), "example_input": IMAGE},
            {
                "model": set(), "example_input": {"None"}, "order": {"None"}, "freeze": set(), "min": {"None", *NUMBER},
                "divisor": {"None", "integer"}, "choices": {"None", "list"}, "base": {"None", "text"},
                "base_args": {"None", "dict"}, "keep_output": {"None", "bool"}, "whole_heads": set(),
                "distributed": {"bool"},
            },
        ),
        "Supernet": (supernet, {}, {"widths": {"None"}}),
        "subnet": (supernet.subnet, {}, {"widths": set()}),
        "at": (supernet.at, {}, {"widths": set()}),
        "extract": (supernet.extract, {}, {"widths": {"None"}}),
        "example": (supernet.example, {}, {"batch_size": {"integer"}}),
        "uniform": (space.uniform, {"ratio": 0.5}, {"ratio": {"number"}, "exact": {"bool"}}),
        "sample": (space.sample, {}, {"generator": {"None", "generator"}}),
        "sample_multiplier": (space.sample_multiplier, {}, {"generator": {"None", "generator"}}),
        "from_dict": (space.from_dict, {}, {"widths": set()}),
        "from_channels": (space.from_channels, {}, {"channels": set()}),
        "space[]": (lambda name: space[name], {}, {"name": set()}),
        "channels": (space.channels, {}, {"widths": set()}),
        "replace": (widths.replace, {"name": "stem", "width": 3}, {"name": set(), "width": {"integer"}}),
        "cost": (
            ta.cost, {"supernet": supernet},
            {
                "supernet": set(), "widths": {"None"}, "batch_size": {"None", "integer"}, "dtype": {"None"},
                "latency": {"None"},
            },
        ),
        "pick": (ta.Cost(1, 1).pick, {}, {"metric": set()}),
        "Conditions": (ta.Conditions, {}, {"batch_size": {"integer"}, "dtype": {"None"}, "latency": {"None"}}),
        "LatencyTable": (
            ta.LatencyTable, {},
            {
                "path": {"None", "text"}, "device": set(), "batch_size": {"integer"}, "dtype": {"None"},
                "runtime": set(), "threads": {"integer"},
            },
        ),
        "reach": (ta.reach, {}, {"supernet": set()}),
        "parse_budgets": (
            ta.parse_budgets, {"supernet": supernet, "budgets": {"macs": 1e9}},
            {"supernet": set(), "budgets": set(), "conditions": {"None"}},
        ),
        "uniform_at": (
            ta.uniform_at, {"supernet": supernet, "metric": "macs", "budget": 1e9},
            {"supernet": set(), "metric": set(), "budget": NUMBER, "conditions": {"None"}},
        ),
        "Budget": (ta.Budget, {"limits": (("macs", 1.0),)}, {"limits": set(), "text": {"text"}}),
        "search": (
            ta.search, search,
            {
                "supernet": set(), "budgets": set(), "evaluate": CALLABLE, "maximize": {"bool"}, "conditions": {"None"},
                "mode": set(), "rank": set(), "steps": {"None", "integer"}, "refine": set(), "scores": {"None"},
                "seed": {"integer", "negative"}, "team": {"None"}, "on_step": {"None", *CALLABLE},
                "progress": {"bool"},
            },
        ),
        "baseline": (
            ta.baseline, method,
            {
                "supernet": set(), "budgets": set(), "evaluate": CALLABLE, "maximize": {"bool"}, "conditions": {"None"},
                "method": set(), "candidates": {"integer"}, "population": {"integer"}, "criterion": set(),
                "scores": {"None"}, "seed": {"integer", "negative"}, "team": {"None"},
                "progress": {"bool"},
            },
        ),
        "HeldOut": (
            ta.HeldOut, {"batches": [1], "score": abs},
            {"batches": {"list", "texts", "tensor", "array"}, "score": CALLABLE},
        ),
        "Team": (ta.Team, {}, {"index": set(), "count": {"integer"}, "gather": CALLABLE}),
        "SharedLatency": (
            ta.SharedLatency, {"latency": ta.LatencyTable(), "team": team}, {"latency": set(), "team": set()},
        ),
        "check_scores": (ta.check_scores, {}, {"scores": set()}),
        "load": (ta.SearchResult.load, {}, {"path": set()}),
        "save": (result.save, {}, {"path": {"text"}}),
        "sandwich_step": (
            ta.sandwich_step, step,
            {
                "model": CALLABLE, "space": set(), "loss_fn": CALLABLE, "generator": {"None", "generator"},
                "n": {"integer"}, "sample": {"None", *CALLABLE}, "distill": CALLABLE, "teacher": {"None", *CALLABLE},
                "teach_widest": set(), "only_widest": {"bool"}, "regularize_widest_only": {"bool"}, "sizes": {"list"},
                "backward": CALLABLE, "no_sync": CALLABLE,
            },
        ),
        "soft_cross_entropy": (
            ta.soft_cross_entropy, {"outputs": LOGITS, "teacher": LOGITS},
            {"outputs": {"tensor"}, "teacher": {"tensor"}, "temperature": NUMBER},
        ),
        "adaptive_alpha_divergence": (
            ta.adaptive_alpha_divergence, {"outputs": LOGITS, "teacher": LOGITS},
            {
                "outputs": {"tensor"}, "teacher": {"tensor"}, "temperature": NUMBER, "alpha_min": {"negative", *NUMBER},
                "alpha_max": {"negative", *NUMBER}, "clip": NUMBER,
            },
        ),
        "calibrate": (
            ta.calibrate, {"model": TwoGroups(), "batches": [IMAGES]},
            {"model": {"module"}, "batches": set(), "distributed": {"bool"}},
        ),
        "batch_statistics": (
            lambda model: contextlib.ExitStack().enter_context(ta.batch_statistics(model)), {}, {"model": {"module"}},
        ),
        "zero_last_norms": (
            ta.zero_last_norms, {"model": TwoGroups(), "example": IMAGE}, {"model": set(), "example": set()},
        ),
        "reorder_channels": (
            ta.reorder_channels, {"model": TwoGroups(), "graph": supernet.graph, "order": "l1"},
            {"model": {"module"}, "graph": set(), "order": set(), "distributed": {"bool"}},
        ),
        "check_folder": (ta.check_folder, {}, {"folder": set()}),
        "create_base": (lambda name: ta.create_base(name), {}, {"name": set()}),
        "create_meta_base": (lambda name: ta.create_meta_base(name), {}, {"name": set()}),
        "export": (ta.export, {"model": supernet.extract(), "out": "x"}, {"model": set(), "out": {"text"}}),
    }  # fmt: skip


NAMES = [
    *("convert", "Supernet", "subnet", "at", "extract", "example", "uniform", "sample", "sample_multiplier"),
    *("from_dict", "from_channels", "space[]", "channels", "replace", "cost", "pick", "Conditions", "LatencyTable"),
    *("reach", "parse_budgets", "uniform_at", "Budget", "search", "baseline", "HeldOut", "Team", "SharedLatency"),
    *("check_scores", "load", "save", "sandwich_step", "soft_cross_entropy", "adaptive_alpha_divergence", "calibrate"),
    *("batch_statistics", "zero_last_norms", "reorder_channels", "check_folder", "create_base", "create_meta_base"),
    "export",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_the_wrong_type_is_refused_by_a_named_error(supernet, name):
    calls = list_calls(supernet)
    assert [*calls] == NAMES
    function, arguments, tried = calls[name]
    for argument, takes in tried.items():
        for kind in VALUES.keys() - takes:
            with pytest.raises(AutoSlimError) as error:
                function(**{**arguments, argument: VALUES[kind]})
            assert "needed: " in str(error.value), (argument, kind, str(error.value))


@pytest.mark.parametrize("value", [0.5, 3, "half", {"stem": 3, "inner": 7}, [3, 7], (0.5,)])
def test_what_looks_like_widths_is_none_of_the_models_inputs(supernet, value):
    with pytest.raises(AutoSlimError, match=r"^widths: got .*; needed: Widths, from supernet\.space"):
        supernet(IMAGES, value)


class Scaled(TwoGroups):
    """Takes further inputs."""

    def forward(self, x, scale=1.0, masks=()):
        return scale * super().forward(x * (masks[0] if masks else 1))


def test_further_inputs_of_the_model_go_by_name_or_are_tensors():
    supernet = ta.convert(Scaled().eval(), IMAGE)
    widths, masks = supernet.space.min(), [torch.ones(8, 8)]
    out = supernet(IMAGES, widths)
    assert out.shape == (4, CLASSES)
    assert torch.equal(supernet(IMAGES, 2.0, widths), 2 * out)
    assert torch.equal(supernet(IMAGES, widths=widths, scale=2.0), 2 * out)
    with supernet.at(widths):
        assert torch.equal(supernet(IMAGES, torch.tensor(2.0)), 2 * out)
        assert torch.equal(supernet(IMAGES, torch.tensor(2.0), masks), 2 * out)
        with pytest.raises(AutoSlimError, match="pass an input of the model by its name"):
            supernet(IMAGES, 2.0)


@pytest.mark.parametrize("batches", [IMAGES, IMAGES[None]])
def test_a_tensor_is_no_iterable_of_batches(supernet, batches):
    with pytest.raises(AutoSlimError, match=r"batches: got a Tensor; .* pass \[images\] for a single batch"):
        ta.calibrate(supernet.extract(), batches)


def test_every_batch_has_to_be_a_tensor(supernet):
    model = supernet.extract()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AutoSlimError, match=r"batches\[1\]: got a list; needed: inputs of the model"):
        ta.calibrate(model, [IMAGES, [IMAGES]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
