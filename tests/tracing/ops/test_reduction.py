"""Normalisation, pooling, reductions: by name as by position."""

import pytest
import torch
from helpers.operators import aten, by_name, reasons, run_rule, tensor
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert

X = (2, 6, 5, 5)
NORM = (tensor(6), tensor(6), tensor(6), tensor(6))
CASES = {
    "native_batch_norm": (aten.native_batch_norm.default, tensor(*X), *NORM, True, 0.1, 1e-5),
    "batch norm without weights": (
        aten.native_batch_norm.default, tensor(*X), None, None, *NORM[2:], True, 0.1, 1e-5
    ),
    "without statistics": (aten._native_batch_norm_legit.no_stats, tensor(*X), *NORM[:2], True, 0.1, 1e-5),
    "native_layer_norm": (aten.native_layer_norm.default, tensor(2, 5, 6), [6], tensor(6), tensor(6), 1e-5),
    "_fused_rms_norm": (aten._fused_rms_norm.default, tensor(2, 5, 6), [6], tensor(6), 1e-5),
    "native_group_norm": (aten.native_group_norm.default, tensor(*X), tensor(6), tensor(6), 2, 6, 25, 2, 1e-5),
    "avg_pool2d": (aten.avg_pool2d.default, tensor(2, 6, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None),
    "max_pool2d_with_indices": (aten.max_pool2d_with_indices.default, tensor(2, 6, 4, 4), [2, 2], [2, 2]),
    "_adaptive_avg_pool2d": (aten._adaptive_avg_pool2d.default, tensor(*X), [2, 2]),
    "upsample_nearest1d": (aten.upsample_nearest1d.default, tensor(2, 6, 5), [10]),
    "upsample_bilinear2d": (aten.upsample_bilinear2d.default, tensor(*X), [10, 10], False),
    "upsample_nearest3d": (aten.upsample_nearest3d.default, tensor(2, 6, 2, 5, 5), [4, 10, 10]),
    "upsample_trilinear3d": (aten.upsample_trilinear3d.default, tensor(2, 6, 2, 5, 5), [4, 10, 10], False),
    "grid_sampler_3d": (aten.grid_sampler_3d.default, tensor(2, 6, 2, 5, 5), tensor(2, 2, 3, 3, 3), 0, 0, False),
    "grid_sampler_2d": (aten.grid_sampler_2d.default, tensor(*X), tensor(2, 3, 3, 2), 0, 0, False),
    "mean": (aten.mean.dim, tensor(*X), [2, 3], True),
    "mean of all": (aten.mean.default, tensor(*X)),
    "var": (aten.var.correction, tensor(*X), [1], 0, True),
    "linalg_vector_norm": (aten.linalg_vector_norm.default, tensor(*X), 2, [1], True),
    "norm": (aten.norm.ScalarOpt_dim, tensor(*X), 2, [1], True),
    "norm of all": (aten.norm.Scalar, tensor(*X), 2),
    "max along": (aten.max.dim, tensor(*X), 1, True),
    "max of two": (aten.max.other, tensor(*X), tensor(6, 1, 1)),
    "argmax": (aten.argmax.default, tensor(*X), 1),
    "any": (aten.any.dims, tensor(*X).bool(), [2, 3]),
    "prod": (aten.prod.dim_int, tensor(*X), 1),
    "cumsum": (aten.cumsum.default, tensor(*X), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_names_and_positions_give_the_same_labels(name):
    assert run_rule(*CASES[name]) == run_rule(*CASES[name], passing=by_name)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ((aten.amax.default, tensor(2, 6)), (aten.amax.default, tensor(2, 6), [0, 1])),
        ((aten.var.correction, tensor(2, 6)), (aten.var.correction, tensor(2, 6), [0, 1])),
        ((aten.var.default, tensor(2, 6), False), (aten.var.correction, tensor(2, 6), [0, 1])),
        ((aten.all.default, tensor(2, 6).bool()), (aten.all.dims, tensor(2, 6).bool(), [0, 1])),
        ((aten.linalg_vector_norm.default, tensor(2, 6)), (aten.linalg_vector_norm.default, tensor(2, 6), 2, [0, 1])),
        ((aten.argmax.default, tensor(6)), (aten.argmax.default, tensor(6), 0)),
        ((aten.avg_pool2d.default, tensor(2, 6, 4, 4), [2, 2]),
         (aten.avg_pool2d.default, tensor(2, 6, 4, 4), [2, 2], [2, 2])),
    ],
    ids=["amax", "var", "var without dimensions", "all", "norm", "argmax", "pooling"],
)  # fmt: skip
def test_defaults_are_those_of_the_schema(short, full):
    assert run_rule(*short) == run_rule(*full)


@pytest.mark.parametrize("name", ["native_batch_norm", "without statistics", "native_group_norm"])
def test_a_norm_joins_its_parameters_with_the_channels(name):
    outcome = run_rule(*CASES[name])
    x, *parameters = outcome["inputs"]
    assert all(labels == [x[1]] for labels in parameters)
    assert outcome["outputs"][0] == x


def test_statistics_of_a_layer_norm_keep_what_is_not_normalized():
    outcome = run_rule(*CASES["native_layer_norm"])
    x, *parameters = outcome["inputs"]
    assert all(labels == [x[2]] for labels in parameters)
    assert outcome["outputs"] == [x, [x[0], x[1], None], [x[0], x[1], None]]


def test_groups_of_a_norm_lose_the_same_channels():
    (x, *_) = run_rule(*CASES["native_group_norm"])["inputs"]
    assert x[1][:3] == x[1][3:]


def test_pooling_keeps_channels_and_freezes_what_it_runs_along():
    outcome = run_rule(*CASES["avg_pool2d"])
    (x,) = outcome["inputs"]
    assert outcome["outputs"] == [[x[0], x[1], None, None]]
    assert reasons(outcome) == {"pooling or resizing treats this dimension as positions, not channels"}
    assert run_rule(*CASES["upsample_nearest1d"])["outputs"][0][2] is None


def test_a_reduction_drops_its_dimensions():
    outcome = run_rule(*CASES["mean"])
    (x,) = outcome["inputs"]
    assert outcome["outputs"] == [[x[0], x[1], None, None]]
    outcome = run_rule(*CASES["prod"])
    (x,) = outcome["inputs"]
    assert outcome["outputs"] == [[x[0], x[2], x[3]]]
    assert run_rule(aten.sum.default, torch.empty((), device="meta"))["outputs"] == [[]]


def test_the_larger_of_two_tensors_joins_them():
    x, other = run_rule(*CASES["max of two"])["inputs"]
    assert other[0] == x[1]


def test_indices_and_running_sums_keep_channels():
    assert reasons(run_rule(*CASES["argmax"])) == {"it returns indices of these channels"}
    assert not reasons(run_rule(*CASES["max along"]))  # nothing reads the indices
    assert reasons(run_rule(*CASES["cumsum"])) == {"a running sum depends on the order of these channels"}


def test_volumes_resized_in_every_way_and_padded_by_their_edges_keep_their_channels():
    """Sampling and padding of volumes: nothing but the input and the output is fixed, and subnets are exact."""

    class Volumes(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv3d(n, 8, 3, padding=1) for n in (2, 8, 8, 8, 8, 8)])
            self.pads = nn.ModuleList([nn.ReflectionPad3d(1), nn.ReplicationPad3d(1), nn.ReplicationPad1d(1)])
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            grid = F.affine_grid(torch.eye(3, 4).expand(len(x), 3, 4), [len(x), 1, 4, 4, 4], align_corners=False)
            x = F.interpolate(self.convs[0](x), scale_factor=2, mode="trilinear")
            x = F.interpolate(self.convs[1](x), scale_factor=2, mode="nearest")
            x = F.interpolate(self.convs[2](x), size=(4, 4, 4), mode="nearest-exact")
            x = F.grid_sample(self.convs[3](x), grid.to(x), align_corners=False)
            x = F.adaptive_max_pool3d(self.pads[1](self.pads[0](self.convs[4](x))), 2)
            return self.head(self.pads[2](self.convs[5](x).flatten(2)).mean(-1))

    images = torch.randn(2, 2, 2, 2, 2)
    supernet = convert(Volumes(), images)
    assert len(supernet.space) == 6
    assert set(supernet.graph.fixed) == {("convs.0.weight", 1), ("head.weight", 0), ("head.bias", 0)}
    widths = supernet.space.uniform(0.5)
    with torch.no_grad():
        assert torch.equal(supernet.eval()(images, widths), supernet.extract(widths).eval()(images))
