"""Globs of module paths: what they match, and what is near to one that matches nothing."""

import pytest

from timm_autoslim.utils.globs import describe_near, matches


@pytest.mark.parametrize(
    ("path", "glob", "expected"),
    [
        ("layer1.0.conv1", "layer1", True),
        ("layer1.0.conv1", "layer1.0", True),
        ("layer1.0.conv1", "*.conv1", True),
        ("layer10.0.conv1", "layer1", False),
        ("layer1.0.conv1", "conv1", False),
        ("layer1.0.conv1", "layer1.?", True),
    ],
)
def test_a_glob_matches_a_module_and_all_modules_in_it(path, glob, expected):
    assert matches(path, glob) == expected


def test_near_paths_are_those_of_modules_that_hold_others_too():
    paths = ["layer1.0.conv1", "layer2.0.conv1", "head.fc"]
    assert "'layer1'" in describe_near("layer3", paths)
    assert describe_near("xyz", paths) == "there are ['layer1', 'layer2', 'head']"
