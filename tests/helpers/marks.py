"""Marks of tests that take longer than about two seconds: `pytest -m "not slow"` leaves them out."""

import pytest


def slow_except(quick, values):
    """The values of a parameter, all marked as slow except the quick ones."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
