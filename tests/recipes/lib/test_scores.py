"""The scores of an unfinished search, in a file that a user may damage."""

import json
import re

import pytest
from accelerate import Accelerator

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.scores import SavedScores


def test_a_file_that_is_no_progress_is_told_and_kept(tmp_path):
    path = tmp_path / "search-progress.json"
    for text in ("{", "[]", '{"scores": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"is no progress of a search .*: remove it to start anew"):
            SavedScores(path, {}, Accelerator())
        assert path.read_text() == text


@pytest.mark.parametrize(
    "score",
    [None, "abc", [1.0], ["a", 64], [float("nan"), 64], [float("inf"), 64], [1.0, -1], [1.0, 8.5], [True, 8], {}],
)
def test_what_is_no_score_is_told_by_its_key_and_kept(tmp_path, score):
    path = tmp_path / "search-progress.json"
    text = json.dumps({"settings": {}, "scores": {"8,8:0": [1, 8], "8,8:1": score}})
    path.write_text(text)
    message = rf"search-progress\.json: scores\['8,8:1'\]: got {re.escape(repr(score))}; .* remove the file"
    with pytest.raises(ConfigError, match=message):
        SavedScores(path, {}, Accelerator())
    assert path.read_text() == text


def test_scores_go_on_and_those_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "search-progress.json"
    with SavedScores(path, {"images": 64, "amp": False}, Accelerator()) as scores:
        scores["8,8:0"] = [0.5, 64]
    assert SavedScores(path, {"images": 64, "amp": False}, Accelerator()) == {"8,8:0": [0.5, 64]}
    with pytest.raises(ConfigError, match=r"an interrupted search with other settings \(amp, batch_size\): give the"):
        SavedScores(path, {"images": 64, "amp": True, "batch_size": 8}, Accelerator())
