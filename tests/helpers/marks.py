"""Which tests the quick selection (`-m "not slow"`) leaves out."""

import pytest


def slow_but(quick, cases):
    """Return the cases of a parametrized test; all are marked slow but those that `quick` names or holds."""
    names, quick = [str(case) for case in cases], {str(case) for case in quick}
    unknown = quick - set(names)
    assert not unknown, f"no cases: {sorted(unknown)}"
    return [
        case if name in quick else pytest.param(case, marks=pytest.mark.slow)
        for case, name in zip(cases, names, strict=True)
    ]
