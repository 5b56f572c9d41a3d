"""The channel graph: a value that never changes, what it says of real networks, and what it says at any widths."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
import torchvision
from helpers.bodies import IMAGE, conv, convert_around
from helpers.models import TwoGroups
from helpers.widths import some_widths
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_autoslim import convert, cost
from timm_autoslim.tracing.trace import trace_model

# -- a value ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def supernet():
    return convert(TwoGroups(), IMAGE)


def facts(graph):
    """All that a graph says, at some widths."""
    sizes = graph.group_sizes
    points = [tuple(sizes), tuple(max(1, n // 2) for n in sizes), (1,) * len(sizes)]
    return (
        *(list(graph.names), list(sizes), dict(graph.fixed), list(graph.shapes), dict(graph.producers)),
        [(graph.macs(w), graph.params(w), graph.slices(w)) for w in points],
    )


def test_freezing_returns_another_graph_and_leaves_this_one_and_the_space_as_they_were(supernet):
    graph, before = supernet.graph, facts(supernet.graph)
    spent, space = cost(supernet), supernet.space
    other = graph.freeze_tensors(["inner.weight"], "a reason")
    assert other is not graph
    assert facts(graph) == before
    assert supernet.graph is graph
    assert supernet.space is space
    assert space.names == ("stem", "inner")
    assert cost(supernet) == spent
    assert cost(supernet, space.min()).params < spent.params
    supernet(IMAGE, space.min())


def test_what_is_frozen_is_fixed_with_its_reason_and_nothing_else_is(supernet):
    frozen = supernet.graph.freeze_tensors(["bn_inner.weight"], "a reason")
    assert list(frozen.names) == ["stem"]
    assert list(frozen.group_sizes) == [8]
    new = frozen.fixed.keys() - supernet.graph.fixed.keys()
    assert {name.partition(".")[0] for name, _ in new} == {"inner", "bn_inner", "outer"}
    assert {frozen.fixed[place] for place in new} == {"a reason"}
    assert frozen.find_reason("inner") == "a reason"
    assert supernet.graph.find_reason("inner") == "it is not fixed"
    everything = frozen.freeze_tensors(["stem.weight"], "another reason")
    assert list(everything.names) == []
    assert everything.fixed["inner.weight", 0] == "a reason"
    assert everything.fixed["stem.weight", 0] == "another reason"
    assert everything.params(()) == sum(p.numel() for p in supernet.model.parameters())


def test_what_carries_no_channels_freezes_nothing(supernet):
    assert supernet.graph.freeze([None], "a reason") == supernet.graph
    assert supernet.graph.freeze_tensors(["bn.num_batches_tracked"], "a reason") == supernet.graph


@pytest.mark.parametrize("name", ["names", "floor", "group_sizes", "fixed", "anything"])
def test_a_graph_cannot_be_changed(supernet, name):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(supernet.graph, name, ())


def test_equal_models_give_equal_graphs_and_others_do_not(supernet):
    graph = supernet.graph
    again = trace_model(TwoGroups(), IMAGE).graph
    assert again == graph
    assert hash(again) == hash(graph)
    assert graph.freeze_tensors(["inner.weight"], "a reason") == again.freeze_tensors(["inner.weight"], "a reason")
    others = [
        graph.freeze_tensors(["inner.weight"], "a reason"),
        trace_model(TwoGroups(), torch.zeros(1, 3, 16, 16)).graph,  # other MACs
        trace_model(TwoGroups(16), IMAGE).graph,
    ]
    assert all(other != graph for other in others)
    assert graph != "a graph"
    assert graph.freeze_tensors(["inner.weight"], "one") != graph.freeze_tensors(["inner.weight"], "another")


def test_macs_parameters_and_slices_are_those_of_the_extracted_model(supernet):
    graph, space = supernet.graph, supernet.space
    for widths in (space.max(), *some_widths(space).values()):
        values = widths.values_
        slim = supernet.extract(widths)
        assert graph.params(values) == sum(p.numel() for p in slim.parameters()) == cost(supernet, widths).params
        assert graph.macs(values) == cost(supernet, widths).macs
        for name, axes in graph.slices(values).tensors.items():
            lengths = [
                n if runs is None else sum(k for _, k in runs) for n, runs in zip(graph.shapes[name], axes, strict=True)
            ]
            assert list(slim.state_dict()[name].shape) == lengths
        assert {path: slim.get_submodule(path).weight.shape[0] for path in graph.producers} == {
            path: count(values) for path, count in graph.producers.items()
        }
    assert graph.slices(space.max().values_).tensors == {}
    assert graph.slices(space.max().values_).attributes == {}


def test_a_subnet_keeps_the_first_units_of_every_strand(supernet):
    graph, widths = supernet.graph, (3, 5)
    limits = [strand.ratio * widths[strand.group] for strand in graph.strands]
    slices = graph.slices(widths).tensors
    for (name, axis), place in graph.places.items():
        kept = [strand < 0 or rank < limits[strand] for strand, rank in zip(place.strand, place.rank, strict=True)]
        runs = slices.get(name, (None,) * len(graph.shapes[name]))[axis]
        indices = range(len(kept)) if runs is None else [i for start, n in runs for i in range(start, start + n)]
        assert list(indices) == np.flatnonzero(kept).tolist(), (name, axis)


# -- real networks ----------------------------------------------------------------------------------------------------


def groups_of_torch_pruning(model, images):
    """Return its groups as sets of (module, axis), and which channels go with channel 1 of the first module."""
    paths = {module: path for path, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, images)
    groups = {}
    for group in graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)):
        root = group[0].dep
        one = graph.get_pruning_group(root.target.module, root.handler, [1])
        places = {}
        for dep, indices in one:
            module = dep.target.module
            if module not in paths:
                continue  # an operator, not a layer
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            is_out = graph.is_out_channel_pruning_fn(dep.handler) or depthwise or isinstance(module, _BatchNorm)
            places.setdefault((paths[module], 0 if is_out else 1), set()).update(indices)
        groups[frozenset(places)] = {place: frozenset(i) for place, i in places.items()}
    return groups


def our_groups(graph):
    """Return ours in the same form."""
    groups = {}
    for index in range(len(graph.strands)):
        places = {}
        for (name, axis), place in graph.places.items():
            if name.endswith(".weight") and (place.strand == index).any():
                here = ((place.strand == index) & (place.rank == 1)).nonzero()[0]
                places[name.removesuffix(".weight"), axis] = frozenset(here.tolist())
        groups[frozenset(places)] = places
    return groups


@pytest.mark.parametrize(
    ("build", "classifier"),
    [
        (lambda: timm.create_model("resnet18"), "fc"),
        pytest.param(lambda: torchvision.models.resnet50(), "fc", marks=pytest.mark.slow),
        pytest.param(lambda: timm.create_model("mobilenetv2_050"), "classifier", marks=pytest.mark.slow),
        pytest.param(
            lambda: torchvision.models.DenseNet(block_config=(3, 3, 2, 2)), "classifier", marks=pytest.mark.slow
        ),
        (lambda: torchvision.models.squeezenet1_1(), "classifier.1"),
        (lambda: torchvision.models.vgg11_bn(), "classifier.6"),
    ],
    ids=["timm/resnet18", "torchvision/resnet50", "timm/mobilenetv2_050", "torchvision/DenseNet",
         "torchvision/squeezenet1_1", "torchvision/vgg11_bn"],
)  # fmt: skip
def test_groups_are_those_of_torch_pruning(build, classifier):
    with torch.device("meta"):
        model = build().eval()
    images = torch.zeros(1, 3, 64, 64, device="meta")
    theirs = groups_of_torch_pruning(model, images)
    del theirs[frozenset({(classifier, 0)})]  # it would remove classes
    assert our_groups(convert(model, images).graph) == theirs


def test_tied_weights_shrink_together():
    def tie(first, second):
        second.weight = first.weight
        return {"first": first, "second": second}

    supernet = convert_around(
        lambda s, x: s.second(s.first(x)), 8, **tie(conv(8, 8, bias=False), conv(8, 8, bias=False))
    )
    slim = supernet.extract(supernet.space.uniform(0.5))
    assert slim.first.weight is slim.second.weight
    assert slim.first.weight.shape == (4, 4, 1, 1)


def test_a_group_is_named_after_the_module_that_produces_it_first():
    supernet = convert_around(lambda s, x: s.b(s.a(x)) + x, 8, a=conv(8, 6), b=conv(6, 8))
    assert supernet.space.names == ("stem", "a")
    assert list(supernet.graph.producers)[:3] == ["stem", "a", "b"]


def test_every_parameter_is_in_a_group_or_fixed_with_a_reason():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.scale

    supernet = convert_around(lambda s, x: s.scaled(s.a(x)), 8, a=conv(8, 8), scaled=Scaled())
    names = {name for name, _ in supernet.graph.lengths} | {name for name, _ in supernet.graph.fixed}
    assert {name for name, _ in supernet.model.named_parameters()} <= names
    assert supernet.graph.fixed["scaled.scale", 0] == "none of its axes carries channels"
