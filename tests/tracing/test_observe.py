"""What a trace observed, as a value that the trace changes no more."""

from timm_autoslim.tracing.flow import Flow
from timm_autoslim.tracing.observe import observe


def test_observations_are_those_of_the_moment():
    flow = Flow()
    flow.stack.paths.append("layer")
    rows, columns, bias = (flow.atoms.create(n) for n in (4, 6, 4))
    flow.join(rows, bias, "add")
    flow.add_producer(rows)
    flow.freeze_label(columns, "a reason")
    labels = {"weight": [rows, columns], "bias": [bias], "scale": [None]}
    shapes = {"weight": (4, 6), "bias": (4,), "scale": (1,)}
    observations = observe(flow, labels, shapes, ["weight", "bias"], tied_names={"other": "weight"})
    flow.join(rows, columns[:4], "mul")
    flow.freeze_label(rows, "another reason")
    flow.add_producer(columns)
    assert observations.roots.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3]
    assert [reason for _, reason in observations.frozen_vectors] == ["layer: a reason"]
    assert [path for path, _ in observations.producers] == ["layer"]
    assert {place: v.tolist() for place, v in observations.vectors.items()} == {
        ("weight", 0): [0, 1, 2, 3],
        ("weight", 1): [4, 5, 6, 7, 8, 9],
        ("bias", 0): [10, 11, 12, 13],
    }
    assert observations.tied_names == {"other": "weight"}
    assert observations.parameters == ("weight", "bias")
