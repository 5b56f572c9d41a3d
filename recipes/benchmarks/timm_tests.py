"""Run timm's own tests of its models, as they stand in its source distribution, on exported slim models.

    pip download --no-deps --no-binary :all: timm && tar xf timm-*.tar.gz
    python recipes/benchmarks/timm_tests.py --tests timm-1.0.31/tests/test_models.py --folder runs/slim
    python recipes/benchmarks/timm_tests.py ... --models test_resnet test_vit --pytest="-x -k default_cfgs"

The smallest model of each timm class is cut to half of its widths and exported to the folder; a run that is started
again exports what is missing. Then pytest runs the tests that timm runs on each of its models. For them the exported
folders are the only registered models, named NAME_slim. It takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import fnmatch
import shlex
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tqdm import tqdm

from timm_autoslim.recipes.benchmarks.lib.models import export_half, list_names

SUFFIX = "_slim"
HOME = "slim_models"  # the module that timm takes for the one that defines them


def register(name: str, folder: Path) -> None:
    """Make an exported folder a registered model."""
    create = timm.create_model

    def build(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # which create_model passes on
            if kwargs.get(key) is None:
                kwargs.pop(key, None)
        model: torch.nn.Module = create(f"local-dir:{folder / name}", pretrained=pretrained, **kwargs)
        return model

    build.__name__ = build.__qualname__ = name + SUFFIX
    build.__module__ = HOME
    setattr(sys.modules[HOME], build.__name__, timm.models.register_model(build))


def make_lister(names: Sequence[str]) -> Callable[..., list[str]]:
    """Return a function in place of `timm.list_models`, which lists these models alone."""
    modules = {name: timm.models._registry._model_to_module[name] for name in names}

    def matches(name: str, globs: str | Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, glob) for glob in ([globs] if isinstance(globs, str) else globs))

    def list_models(
        filter: str | Sequence[str] = "",
        module: str | Sequence[str] = "",
        pretrained: bool = False,
        exclude_filters: str | Sequence[str] = "",
        **_: Any,
    ) -> list[str]:
        return [
            name + SUFFIX
            for name in names
            if not pretrained
            and (not module or matches(modules[name], module))
            and (not filter or matches(name + SUFFIX, filter))
            and not matches(name + SUFFIX, exclude_filters)
        ]

    return list_models


def main() -> int:
    """Export, register and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="timm's tests/test_models.py")
    parser.add_argument("--folder", type=Path, default=Path("runs/slim"), help="for the exported models")
    parser.add_argument("--models", nargs="+", help="these instead of the smallest of each class")
    parser.add_argument("--pytest", default="", help="further arguments of pytest, as one text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.models or [name for name in list_names(smallest=True) if not name.startswith("torchvision/")]
    for name in tqdm([n for n in names if not (args.folder / n).exists()], desc="exported"):
        export_half(name, args.folder / name)
    sys.modules[HOME] = types.ModuleType(HOME)
    for name in names:
        register(name, args.folder.resolve())
    value = timm.get_pretrained_cfg_value
    timm.list_models, timm.list_pretrained = make_lister(names), lambda *_, **__: []
    timm.get_pretrained_cfg_value = lambda name, key: value(name.removesuffix(SUFFIX), key)
    options = ["-n0", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-k", SUFFIX]
    return int(pytest.main([*options, *shlex.split(args.pytest), str(args.tests)]))


if __name__ == "__main__":
    raise SystemExit(main())
