"""Latencies are measured in turns, on a copy, and bad settings are refused."""

import re

import pytest
import torch
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import LatencyTable, measure_latency
from timm_autoslim.costs import measure
from timm_autoslim.costs.measure import measure_in_turns, measure_turns
from timm_autoslim.errors import LatencyError


class Sleeping(nn.Module):
    """Takes ten times as long for ten times the layers, without a word about how long one takes."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers)))

    def forward(self, x):
        return self.layers(x)


def test_a_model_of_twenty_layers_takes_longer_than_one_of_one():
    short, long = (measure_latency(Sleeping(n), torch.randn(64, 256)) for n in (1, 20))
    assert 0 < 4 * short < long


def test_measuring_leaves_model_and_threads_alone():
    model = TwoGroups().train()
    before, threads = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_num_threads()
    assert measure_latency(model, torch.randn(2, 3, 8, 8), threads=2, dtype=torch.float64, repeats=2) > 0
    assert model.training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())


class Named(nn.Module):
    """Notes each of its runs."""

    def __init__(self, name, runs):
        super().__init__()
        self.name, self.runs = name, runs

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.runs.append(self.name)
        return x


def test_models_are_measured_in_turns_and_the_median_turn_counts(monkeypatch):
    runs, times = [], iter([1.0, 3.0, 5.0, 70.0, 20.0, 9.0, 2.0, 4.0, 7.0])

    def timed(run, *_):
        run()
        return next(times)

    monkeypatch.setattr(measure, "time_runs", timed)
    models = (Named(name, runs) for name in "abc")
    assert measure_in_turns(models, torch.ones(1), rounds=3, repeats=2) == [2.0, 4.0, 7.0]
    assert runs == list("abc" * 3)


def test_every_turn_can_be_had_for_the_spread(monkeypatch):
    times = iter([1.0, 3.0, 2.0, 5.0, 9.0, 4.0])
    monkeypatch.setattr(measure, "time_runs", lambda run, *_: next(times))
    models = (Named(name, []) for name in "ab")
    assert measure_turns(models, torch.ones(1), rounds=3, repeats=1) == [[1.0, 2.0, 9.0], [3.0, 5.0, 4.0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "device: got 'gpu', which cannot be used here"),
        ({"device": "cuda:77"}, "device: got 'cuda:77', which cannot be used here"),
        ({"device": "meta"}, "device: got 'meta', on which nothing is computed"),
        (
            {"runtime": "tensorrt"},
            "runtime: got 'tensorrt'; needed: one of ['eager', 'compile', 'cudagraph', 'onnxruntime']",
        ),
        ({"device": None}, "device: got 'None', which cannot be used here"),
        ({"threads": 0}, "threads: got 0; needed: a positive integer"),
        ({"threads": True}, "threads: got True; needed: a positive integer"),
        ({"dtype": torch.int8}, "dtype: got torch.int8; needed: a floating point type"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, message):
    with pytest.raises(LatencyError, match=re.escape(message)):
        measure_latency(TwoGroups(), torch.randn(2, 3, 8, 8), **given)
    with pytest.raises(LatencyError, match=re.escape(message)):
        LatencyTable(**given)


@pytest.mark.parametrize(
    ("model", "inputs", "given", "message"),
    [
        (TwoGroups(), torch.zeros(1, 3, 8, 8), {"repeats": 0}, "repeats: got 0; needed: a positive integer"),
        (TwoGroups(), torch.zeros(1, 3, 8, 8), {"repeats": "3"}, "repeats: got '3'; needed: a positive integer"),
        (None, torch.zeros(1, 3, 8, 8), {}, "the model: got a NoneType; needed: an nn.Module, as supernet.extract"),
        (
            TwoGroups(),
            torch.zeros(1, 5, 8, 8),
            {},
            "the model: cannot run as runtime='eager' (RuntimeError: Given",
        ),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused(model, inputs, given, message):
    with pytest.raises(LatencyError, match=re.escape(message)):
        measure_latency(model, inputs, **given)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = TwoGroups()
    with pytest.raises(LatencyError, match="the model: got one on the meta device, without weights"):
        measure_latency(model, torch.randn(2, 3, 8, 8))
