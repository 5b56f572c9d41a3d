"""CUDA graphs: refused without a GPU; what is timed is the mean of several copies of an operator."""

import pytest
import torch
from torch import nn

from timm_autoslim import LatencyTable, convert, measure_latency
from timm_autoslim.costs import cuda_graph
from timm_autoslim.costs.cuda_graph import COPIES, check_cuda_graph, start_cuda_graph, time_operator
from timm_autoslim.errors import LatencyError

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_device_without_cuda_graphs_is_refused():
    with pytest.raises(
        LatencyError, match=r"runtime: got 'cudagraph' on 'cpu'; needed: a CUDA device; or take runtime"
    ):
        check_cuda_graph(CPU)
    with pytest.raises(LatencyError, match="a CUDA device"):
        LatencyTable(runtime="cudagraph")
    check_cuda_graph(torch.device("cuda", 1))


def test_an_operator_is_timed_as_the_mean_of_its_copies(monkeypatch):
    runs = []
    clock = iter(range(0, 1000, 2))  # every round takes one tick of 2 s
    monkeypatch.setattr(cuda_graph, "_record", lambda run, device: run)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(cuda_graph.time, "perf_counter", lambda: next(clock))
    milliseconds = time_operator(None, lambda: runs.append(1), CPU, 1)
    rounds = len(runs) / COPIES / cuda_graph.REPLAYS
    assert rounds == 1 + cuda_graph.ROUNDS
    assert milliseconds == pytest.approx(2e3 / (cuda_graph.REPLAYS * COPIES))


def test_an_operator_that_cannot_be_recorded_has_no_time(monkeypatch):
    def refuse(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "_record", refuse)
    assert time_operator(None, list, CPU, 1) is None


@needs_gpu
def test_a_graph_gives_what_the_model_gives():
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).cuda().eval(), torch.randn(2, 3, 8, 8).cuda()
    with torch.no_grad():
        assert torch.equal(start_cuda_graph(model, images, 1)(), model(images))
    assert measure_latency(model, images, device="cuda", runtime="cudagraph", repeats=3) > 0


@needs_gpu
def test_a_table_predicts_graphs():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3)).cuda().eval()
    supernet = convert(model, torch.zeros(1, 3, 16, 16).cuda())
    table = LatencyTable(device="cuda", runtime="cudagraph")
    assert table.predict(supernet, supernet.space.max()) > 0
