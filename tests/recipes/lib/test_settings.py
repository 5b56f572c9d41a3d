"""The settings of a run are kept once its work has begun."""

import pytest
import yaml

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.settings import check_same, write_settings


def test_settings_may_change_until_the_work_has_begun(tmp_path):
    path = tmp_path / "settings.yaml"
    assert not check_same(path, {"lr": 1}, begun=False)
    write_settings(path, {"lr": 1})
    assert not check_same(path, {"lr": 2}, begun=False)
    write_settings(path, {"lr": 2})
    assert yaml.safe_load(path.read_text()) == {"lr": 2}
    with pytest.raises(ConfigError, match=r"was begun with other settings \(lr\)"):
        check_same(path, {"lr": 3}, begun=True)
    assert check_same(path, {"lr": 2}, begun=True)


def test_what_has_changed_is_told_but_for_hashes(tmp_path):
    path = tmp_path / "settings.yaml"
    write_settings(path, {"lr": 1, "weights_sha256": "a"})
    with pytest.raises(ConfigError, match=r"another --experiment\. lr was 1, and is 2\.$"):
        check_same(path, {"lr": 2, "weights_sha256": "b"}, begun=True)
    with pytest.raises(ConfigError, match=r"\(weights_sha256\): .* another --experiment\.$"):
        check_same(path, {"lr": 1, "weights_sha256": "b"}, begun=True)
