"""Widths of every kind, to test a search space with."""

import torch


def arbitrary_widths(space, generator=None):
    """Return random widths from the floor to the size of each group, whatever the choices and divisors."""
    draw = {g.name: int(torch.randint(g.floor, g.size + 1, (), generator=generator)) for g in space.groups}
    return space.from_dict(draw)


def some_widths(space, seed=0):
    """Return widths of every kind by name, the widest left out."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "min": space.min(),
        "half": space.uniform(0.5),
        "random": space.sample(generator),
        "arbitrary": arbitrary_widths(space, generator),
        "narrowest": space.from_dict({g.name: g.floor for g in space.groups}),
    }
