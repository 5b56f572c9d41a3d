"""ONNX files of networks, where the packages are there."""

import importlib.util

import pytest

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.onnx_file import check_onnx


def test_packages_that_lack_are_named_before_any_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "onnx" or None)
    with pytest.raises(ConfigError, match=r"--onnx needs onnxscript and onnxruntime: pip install"):
        check_onnx()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_onnx()
