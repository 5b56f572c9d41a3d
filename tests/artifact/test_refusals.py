"""What is refused before a slim model is written, whichever function writes it."""

import pytest
import torch
from torch import nn

from timm_autoslim.artifact.refusals import refuse_stale, refuse_without_numbers, require_spec
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError, StaleStatisticsError

NARROW = Spec(sizes={"0.weight": [2, None]})


def make_model(batches):
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(2)))
    model[1][0].num_batches_tracked.fill_(batches)
    return model


def test_a_model_has_a_spec():
    model = make_model(1)
    with pytest.raises(ArtifactError, match=r"Sequential: got no spec; .*supernet\.extract"):
        require_spec(model, "save")
    model.autoslim = NARROW
    assert require_spec(model, "save") is NARROW
    with pytest.raises(ArtifactError, match=r"save\(model\._orig_mod, \.\.\.\)"):
        require_spec(torch.compile(model, backend="eager"), "save")


def test_a_model_has_numbers():
    refuse_without_numbers(make_model(1))
    with pytest.raises(ArtifactError, match=r"0\.weight: got a tensor on the meta device"):
        refuse_without_numbers(make_model(1).to("meta"))


@pytest.mark.parametrize(("batches", "spec", "unused"), [(1, NARROW, []), (-3, Spec(), []), (-3, NARROW, ["1"])])
def test_statistics_of_its_own_of_the_widest_or_of_a_layer_that_does_not_run_are_fine(batches, spec, unused):
    refuse_stale(make_model(batches), spec, lambda: set(unused))


def test_statistics_of_another_subnet_are_refused():
    with pytest.raises(StaleStatisticsError, match=r"^1\.0: .* 4 batches .* for longer, before save"):
        refuse_stale(make_model(-3), NARROW, set, "before save")
