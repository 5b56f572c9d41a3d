"""Where a model's code calls functions of torch."""

import sys

import pytest

from timm_autoslim.tracing.sites import find_culprits, find_model_site, find_site, format_site


def test_a_site_is_in_the_code_of_the_model():
    path, code, _ = site = find_site("layer", sys._getframe())
    assert (path, code) == ("layer", sys._getframe().f_code)
    assert format_site(site).endswith(f"test_sites.py:{sys._getframe().f_lineno - 2}")


def test_layers_of_torch_have_no_sites():
    sites = []
    scope = {"__name__": "torch.nn.modules.activation", "find_site": find_site, "sites": sites, "sys": sys}
    exec("sites.append(find_site('', sys._getframe()))", scope)
    assert sites == [None]
    scope["__name__"] = "torch.nn.functional"  # its caller counts
    exec("sites.append(find_site('', sys._getframe()))", scope)
    assert sites[1][1] is sys._getframe().f_code


@pytest.mark.parametrize(
    ("culprits", "needs_all"), [({3}, False), ({0, 5}, False), ({0, 5}, True), (set(range(6)), False)]
)
def test_groups_that_decide_a_difference(culprits, needs_all):
    def differs(groups):
        return culprits <= set(groups) if needs_all else not culprits.isdisjoint(groups)

    found = find_culprits(range(6), differs)
    assert culprits <= set(found)
    assert needs_all or set(found) == culprits


def test_code_whose_name_only_begins_with_torch_is_the_models_own():
    sites = []
    scope = {"__name__": "torchmine", "find_site": find_site, "sites": sites, "sys": sys}
    exec("sites.append((find_site('', sys._getframe()), sys._getframe().f_code))", scope)
    assert sites[0][0][1] is sites[0][1]


def test_a_call_is_at_one_place_however_often_it_ran():
    """Python 3.11 makes calls by another instruction once the code is warm."""
    places = set()

    class Probe:
        def __len__(self):
            places.add(find_model_site("", sys._getframe(1)))
            return 1

    def count(probe):
        return len(probe)

    for _ in range(100):
        count(Probe())
    assert len(places) == 1
