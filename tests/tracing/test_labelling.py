"""The labels of tensors, and the steps that every rule takes."""

import torch

from timm_autoslim.tracing.labelling import Labelling


def test_a_dimension_without_channels_freezes_what_it_is_joined_with():
    labelling = Labelling()
    a, b = (labelling.create_labels(torch.empty(2, 6, device="meta")) for _ in range(2))
    assert labelling.join(a[1], b[1], "add") is a[1]
    assert not labelling.constraints.frozen_vectors
    assert labelling.join(None, b[1], "add") is b[1]
    assert labelling.is_frozen(a[1])
    ((_, reason),) = labelling.constraints.frozen_vectors
    assert reason == "the model: add combines these channels with a dimension that cannot shrink"


def test_a_dimension_of_length_one_carries_no_channels():
    labelling = Labelling()
    one, many = torch.empty(1, 6, device="meta"), torch.empty(3, 6, device="meta")
    rows, columns = labelling.create_labels(one)
    assert rows is None
    labels = labelling.broadcast([one, many], many.shape, "mul")
    assert labels[0] is None
    assert labels[1] is columns
