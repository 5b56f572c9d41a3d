"""What fine-tuned networks are worth lies in their exported folders."""

import json

import pytest

from timm_autoslim import Cost
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.networks import Network
from timm_autoslim.recipes.lib.results import read_result, read_results, write_result


class Widths(dict):
    def to_dict(self):
        return dict(self)


def make_network(name, **widths):
    return Network(name, "searched", "macs<=50%", {"macs": 9.0}, Widths(widths), Cost(8, 7), 0.5)


def test_each_network_has_a_file_of_its_own(tmp_path):
    assert read_results(tmp_path) == {}
    for name, top1 in (("first", 50.0), ("second", 60.0), ("third", None)):
        (tmp_path / "exported" / name).mkdir(parents=True)
        if top1:
            write_result(tmp_path / "exported" / name, make_network(name, a=3), {"top1": top1, "loss": 1.0})
    shared = {"method": "searched", "budget": "macs<=50%", "macs": 8, "params": 7, "loss": 1.0, "widths": {"a": 3}}
    assert read_results(tmp_path) == {"first": shared | {"top1": 50.0}, "second": shared | {"top1": 60.0}}
    assert read_result(tmp_path / "exported" / "third") is None  # exported, and not tested yet


@pytest.mark.parametrize("change", [{"top1": "good"}, {"macs": None}, {"widths": 3}, {"method": 3}, {"budget": None}])
def test_what_is_no_result_is_told(tmp_path, change):
    write_result(tmp_path, make_network("a"), {"top1": 50.0})
    path = tmp_path / "result.json"
    good = json.loads(path.read_text())
    for text in (json.dumps(good | change), "{", "[]", "\x00"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"result\.json: got no result of a network; needed: .*; remove it, and"):
            read_result(tmp_path)
