"""What a subnet lacks, made zero in the model itself: its outputs are then those of the subnet.

That shows channels at wrong places, which shapes do not show. It holds for layers in which a channel of zeros changes
no other one.
"""

import copy

import torch


@torch.no_grad()
def mask(supernet, widths):
    """Return a copy of the supernet's model in which all weights that a subnet lacks are zero."""
    model = copy.deepcopy(supernet.model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, axes in supernet.graph.slices(widths.values_).tensors.items():
        for dim, runs in enumerate(axes):
            if runs is not None:
                lacking = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                for start, length in runs:
                    lacking[start : start + length] = False
                tensors[name].index_fill_(dim, lacking.nonzero().flatten(), 0)
    return model


@torch.no_grad()
def check_masked(supernet, images, samples=3):
    """Compare the narrowest subnet, one of half width and random ones with masked and with extracted models."""
    generator, space = torch.Generator().manual_seed(0), supernet.space
    for widths in (space.min(), space.uniform(0.5), *(space.sample(generator) for _ in range(samples))):
        outputs = supernet(images, widths)
        torch.testing.assert_close(outputs, mask(supernet, widths)(images))
        assert torch.equal(outputs, supernet.extract(widths)(images))
