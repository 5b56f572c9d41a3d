"""The accuracy of a fine-tuned network is read from its exported folder, or refused."""

import json

import pytest

from timm_autoslim import Accuracy
from timm_autoslim.errors import ArtifactError

ROW = {"method": "searched", "budget": "macs<=50%", "macs": 8, "params": 7, "top1": 50, "widths": {"a": 3}}


def test_networks_of_a_run_are_read_by_name_and_those_not_tested_yet_are_left_out(tmp_path):
    assert Accuracy.load_run(tmp_path) == {}
    for name in ("first", "second", "third", ".draft"):
        (tmp_path / "exported" / name).mkdir(parents=True)
        if name != "third":
            (tmp_path / "exported" / name / "result.json").write_text(json.dumps({**ROW, "loss": 1.0}))
    assert Accuracy.load_run(tmp_path) == dict.fromkeys(["first", "second"], Accuracy(**ROW))
    assert Accuracy.load(tmp_path / "exported" / "third") is None


@pytest.mark.parametrize("change", [{"top1": "good"}, {"macs": None}, {"widths": 3}, {"method": 3}, {"budget": None}])
def test_what_is_no_accuracy_is_told(tmp_path, change):
    (tmp_path / "result.json").write_text(json.dumps(ROW | change))
    with pytest.raises(ArtifactError, match=rf"result\.json\.{next(iter(change))}: got .*; needed: an? "):
        Accuracy.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "\x00", "[]", json.dumps({**ROW, "top1": float("nan")}), "{}"])
def test_another_file_is_told(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"result\.json.*: got .*; needed: "):
        Accuracy.load(tmp_path)
