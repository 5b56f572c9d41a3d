"""Moments of inputs and outputs, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_autoslim.utils.moments import Sums
from timm_autoslim.utils.processes import pool_alone


def sum_up(x, y, parts):
    """Return the moments of rows (G, R, I) and (G, R, O) that are added in parts."""
    sums = Sums(x[:, 0], y[:, 0])
    for a, b in zip(x.split(parts, 1), y.split(parts, 1), strict=True):
        sums.add(a, b)
    return sums.read(pool_alone)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([0.0, 100.0]))
def test_moments_are_means_of_products(seed, parts, offset):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 30, n, generator=generator) + offset for n in (3, 4))
    moments, a, b = sum_up(x, y, parts), x.double(), y.double()
    assert moments.count == 30
    expected = a.mean(1), b.mean(1), a.transpose(1, 2) @ a / 30, a.transpose(1, 2) @ b / 30, (b * b).mean(1)
    values = moments.x, moments.y, moments.xx, moments.xy, moments.yy
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-5)
    centered = moments.center()
    torch.testing.assert_close(centered.xx[1], torch.cov(a[1].T, correction=0), rtol=1e-4, atol=1e-5)
    moved = moments.move(torch.full((2, 3), 2.0).double(), torch.full((2, 4), -1.0).double())
    torch.testing.assert_close(moved.center().xy, centered.xy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.x, moments.x + 2)


def test_several_processes_add_their_rows():
    x, y = torch.randn(1, 20, 3), torch.randn(1, 20, 2)
    other = sum_up(x[:, 15:], y[:, 15:], 5)

    def add(tensors):  # as if another process had these
        parts = other.x, other.y, other.xx, other.xy, other.yy
        theirs = [torch.tensor(5.0), *(5 * part for part in parts)]
        return [a.double() + b for a, b in zip(tensors, theirs, strict=True)]

    together, every = sum_up(x[:, :15], y[:, :15], 5).pool(add), sum_up(x, y, 20)
    assert together.count == 20
    torch.testing.assert_close(together.xx, every.xx, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(together.y, every.y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 5])
def test_there_may_be_no_outputs_and_no_rows(rows):
    sums = Sums(torch.zeros(1, 3), torch.zeros(1, 0))
    sums.add(torch.ones(1, rows, 3), torch.ones(1, rows, 0))
    moments = sums.read(pool_alone)
    assert moments.count == rows
    assert moments.xy.shape == (1, 3, 0)
    assert moments.x.eq(float(rows > 0)).all()
