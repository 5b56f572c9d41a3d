"""Small networks to search, what an evaluate charges for their widths, and what every result must hold."""

from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import nn

from helpers.models import randomise
from timm_autoslim import HeldOut, convert, cost
from timm_autoslim.slimming.budgets import Budget

IMAGE = torch.zeros(1, 3, 8, 8)
SIZES = {"a": 16, "b": 16, "c": 32}  # channels of the branches
PRICES = {"a": 5.0, "b": 1.0, "c": 3.0}  # of their channels, in a loss


class Branches(nn.Module):
    """Three branches side by side: the cost is a sum over them, so the best widths can be found by hand."""

    def __init__(self):
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, nn.Conv2d(3, size, 3, padding=1, bias=False))
            setattr(self, f"{name}_bn", nn.BatchNorm2d(size))
            setattr(self, f"{name}_out", nn.Conv2d(size, 4, 1, bias=False))

    def forward(self, x):
        return sum(
            getattr(self, f"{n}_out")(getattr(self, f"{n}_bn")(getattr(self, n)(x)).relu()) for n in SIZES
        ).mean((2, 3))  # fmt: skip


def make_supernet():
    """Convert three branches with random weights."""
    return convert(randomise(Branches()), IMAGE, min=2, divisor=2)


# -- losses by width --------------------------------------------------------------------------------------------------


def charge(supernet, **price):
    """Return an evaluate that charges, for every group, a price for each channel that is gone; it counts its calls."""

    def evaluate(subnet):
        evaluate.calls += 1
        assert subnet(IMAGE.repeat(2, 1, 1, 1)).shape == (2, 4)
        gone = {name: SIZES[name] - width for name, width in width_of(supernet).items()}
        return sum(price[name] * gone[name] for name in SIZES)

    evaluate.calls = 0
    return evaluate


def held_out(supernet, parts=4, seen=None):
    """Return an evaluate in parts of 1, 2, 3... images, whose prices differ a little from part to part."""

    def score(subnet, part):
        assert subnet(IMAGE.repeat(part + 1, 1, 1, 1)).shape == (part + 1, 4)
        if seen is not None:
            seen.append((supernet.space.from_dict(width_of(supernet)), part))
        return sum(PRICES[n] * (1 + 0.1 * part) / w for n, w in width_of(supernet).items())

    return HeldOut(range(parts), score)


def width_of(supernet):
    """Return the widths that the supernet runs with now, by group."""
    return dict(supernet.open_block or supernet.space.max())


# -- networks and budgets of any kind ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """Convolutions one after the other; those that ask for it are added to what they read."""

    def __init__(self, layers):
        super().__init__()
        self.convs, self.steps = nn.ModuleList(), []
        fan_in = 3
        for size, residual in layers:
            self.convs.append(nn.Conv2d(fan_in, fan_in if residual else size, 3, padding=1))
            self.steps.append(residual)
            fan_in = self.convs[-1].out_channels
        self.head = nn.Linear(fan_in, 4)

    def forward(self, x):
        for conv, residual in zip(self.convs, self.steps, strict=True):
            x = conv(x).relu() + x if residual else conv(x).relu()
        return self.head(x.mean((2, 3)))


# the images' three channels are fixed, so the first convolution is never residual
layers = st.lists(st.tuples(st.integers(2, 40), st.booleans()), min_size=1, max_size=5).map(
    lambda sizes: [(sizes[0][0], False), *sizes[1:]]
)
few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def draw_budgets(supernet, draw, metrics):
    """Draw one reachable limit for each metric, anywhere from the narrowest to the widest."""
    low, high = cost(supernet, supernet.space.min()), cost(supernet)
    return " and ".join(
        f"{m}<={draw(st.integers(low.pick(m), high.pick(m)), label=m)}" for m in sorted(metrics)
    )  # fmt: skip


def assert_filled(supernet, network):
    """Within 1 % of a limit, or not one unit more of any group fits; and never above."""
    budget = Budget(tuple(network.limits.items()))
    assert network.cost == cost(supernet, network.widths)
    assert all(network.cost.pick(metric) <= limit for metric, limit in network.limits.items())
    assert network.limits[network.metric] == network.budget
    shares = {metric: network.cost.pick(metric) / limit for metric, limit in network.limits.items()}
    assert shares[network.metric] == max(shares.values())
    if shares[network.metric] < 0.99:
        for group in supernet.space.groups:
            width = network.widths[group.name]
            if width < group.size:
                assert not budget.holds(cost(supernet, network.widths.replace(group.name, width + 1))), group.name


# -- costs that may grow as groups narrow ---------------------------------------------------------------------------


class LatencyFunction:
    """A latency table's stand-in: it predicts by a function of the widths, as shares of the groups' sizes."""

    def __init__(self, milliseconds):
        self.milliseconds = milliseconds

    def predict(self, supernet, widths):
        return self.milliseconds([widths[g.name] / g.size for g in supernet.space.groups])


def aligned(shares):
    """Every group whose width is no multiple of a quarter takes half a millisecond more."""
    return 10 * sum(shares) / len(shares) + 0.5 * sum(share % 0.25 > 0 for share in shares)


def in_step(shares):
    """Groups that are not about equally wide take much longer: no first step saves anything."""
    return 10 * sum(shares) / len(shares) + 20 * (max(shares) - min(shares) > 0.05)


def rename_method(result, method, **changes):
    """Return a result of another method."""
    return replace(result, networks=tuple(replace(network, method=method) for network in result.networks), **changes)
