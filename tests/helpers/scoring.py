"""Shared by tests: scoring."""

from helpers.searches import IMAGE, Branches, width_of
from helpers.zoo import randomise
from timm_autoslim import HeldOut, convert

PRICES = {"a": 5.0, "b": 1.0, "c": 3.0}


def make_supernet():
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


def held_out(supernet, parts=4, seen=None):
    """Return an evaluate in parts of 1, 2, 3... images, whose prices differ a little from part to part."""

    def score(subnet, part):
        assert subnet(IMAGE.repeat(part + 1, 1, 1, 1)).shape == (part + 1, 4)
        if seen is not None:
            seen.append((supernet.space.from_dict(width_of(supernet)), part))
        return sum(PRICES[n] * (1 + 0.1 * part) / w for n, w in width_of(supernet).items())

    return HeldOut(range(parts), score)
