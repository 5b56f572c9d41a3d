"""The table of slim networks beside the original, and whether a network that is loaded again is that of before."""

import json

import pytest

from timm_autoslim.errors import ArtifactError, ConfigError
from timm_autoslim.recipes.lib.comparison import (
    Row,
    check_accuracy,
    describe_turns,
    make_table,
    read_original,
    write_original,
)

ORIGINAL = Row("original", 90.0, 10_000_000, 2_000_000, 8_000_000, 4.0, (3.9, 4.2))


@pytest.mark.parametrize(("top1", "images"), [(50.0, 100), (53.0, 100), (47.0, 100), (50.1, 10_000)])
def test_a_few_images_may_change_sides(tmp_path, top1, images):
    row = {"method": "searched", "budget": "macs<=50%", "macs": 5, "params": 6, "top1": 50.0, "widths": {}}
    (tmp_path / "result.json").write_text(json.dumps(row))
    check_accuracy(tmp_path, top1, images)


def test_a_network_that_changed_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="and had no accuracy"):
        check_accuracy(tmp_path, 50.0, 100)
    row = {"method": "searched", "budget": "macs<=50%", "macs": 5, "params": 6, "top1": 50.0, "widths": {}}
    (tmp_path / "result.json").write_text(json.dumps(row))
    for top1, images in ((54.0, 100), (50.2, 10_000)):
        with pytest.raises(ArtifactError, match=rf"has {top1:.2f} % of {images} test images .*, and had 50.00 %"):
            check_accuracy(tmp_path, top1, images)


def test_the_original_is_read_as_it_was_written(tmp_path):
    assert read_original(tmp_path) is None
    row = Row("original", 90.0, 10_000_000, 2_000_000, 8_000_000)
    write_original(tmp_path, row)
    assert read_original(tmp_path) == row
    (tmp_path / "original.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"original\.json cannot be read .*: remove it"):
        read_original(tmp_path)


def test_the_table_tells_what_a_network_lost_and_saved():
    half = Row("half", 88.5, 5_000_000, 500_000, 2_000_000, **describe_turns([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]))
    first, second = make_table(ORIGINAL, [half]).splitlines()[2:]
    assert first == "| original | 90.00 | | 10.00M | 2.000M | 8.00 MB | 4 ms [3.9, 4.2] |"
    assert second == "| half | 88.50 | 1.50 | 5.00M (50%) | 0.500M (25%) | 2.00 MB (25%) | 2 ms [1, 3] (50%) |"


def test_the_share_of_a_latency_is_a_range_where_the_turns_do_not_agree():
    original = [4.0, 5.0, 4.0, 9.0, 4.0]
    steady = Row("steady", 88.5, 1, 1, 1, **describe_turns([time / 2 for time in original], original))
    busy = Row("busy", 88.5, 1, 1, 1, **describe_turns([2.0, 3.0, 6.0, 3.0, 2.0], original))
    table = make_table(ORIGINAL, [steady, busy]).splitlines()
    assert table[3].endswith("| 2 ms [2, 3.5] (50%) |")
    assert table[4].endswith("| 3 ms [2, 4.5] (42 to 105%) |")
