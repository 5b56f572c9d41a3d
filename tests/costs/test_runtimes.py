"""Every runtime runs the same model."""

import shutil

import pytest
import torch
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import RUNTIMES, measure_latency
from timm_autoslim.costs.measure import measure_in_turns
from timm_autoslim.errors import LatencyError


def test_every_runtime_has_a_name_and_says_what_it_is_measured_in():
    assert list(RUNTIMES) == ["eager", "compile", "cudagraph", "onnxruntime"]
    assert [name for name, runtime in RUNTIMES.items() if runtime.time_operator] == ["cudagraph", "onnxruntime"]
    assert RUNTIMES["eager"].version() == RUNTIMES["compile"].version() == ""
    with pytest.raises(LatencyError, match="runtime: got 'onnxruntime' on 'cuda'; needed: the device \"cpu\""):
        RUNTIMES["onnxruntime"].check(torch.device("cuda"))
    with pytest.raises(LatencyError, match="runtime: got 'cudagraph' on 'cpu'; needed: a CUDA device; or take"):
        measure_latency(nn.Linear(4, 4), torch.randn(2, 4), runtime="cudagraph")


@pytest.mark.slow
def test_onnxruntime_runs_the_same_model():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = TwoGroups().eval(), torch.randn(2, 3, 8, 8)
    assert measure_latency(model, images, runtime="onnxruntime", repeats=3) > 0
    (logits,) = RUNTIMES["onnxruntime"].start(model, images, 1)()
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), model(images), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_model_is_measured():
    assert measure_latency(nn.Linear(4, 4), torch.randn(2, 4), runtime="compile", repeats=3) > 0


@pytest.mark.slow
def test_every_compiled_model_runs_compiled(monkeypatch):
    """torch.compile runs the ninth model of a class in eager mode by default, for all share the class's code."""
    compiled, plain = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: plain(model, backend=lambda graph, _: compiled.append(1) or graph)
    )
    torch.compiler.reset()
    models = [TwoGroups(n) for n in range(8, 20)]
    assert len(measure_in_turns(models, torch.randn(2, 3, 8, 8), runtime="compile", rounds=2, repeats=1)) == len(models)
    assert len(compiled) == len(models)
