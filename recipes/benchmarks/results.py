"""What the benchmarks share: rows that outlive a stopped run, tables in a page, and exported halves of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import timm_autoslim
from timm_autoslim.artifact.bases import create_base
from timm_autoslim.utils.files import write_text


class Results(list[dict[str, Any]]):
    """Rows of a benchmark, one JSON line each in a file: a run that is started again goes on with what it lacks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed while it wrote
            write_text(path, whole)
        super().__init__(json.loads(line) for line in whole.splitlines())

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in the file too."""
        self.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def put_table(page: Path, name: str, text: str) -> None:
    """Replace what stands in a page between the lines <!-- NAME --> and <!-- /NAME -->."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the lines {begin.strip()} and {end}: the table goes between them")
    write_text(page, f"{before}{begin}{text.strip()}\n{end}{after}")


def export_half(name: str, folder: Path) -> nn.Module:
    """Export a model of timm, or torchvision/NAME, with random weights and half of its widths; return it whole."""
    torch.manual_seed(0)
    model = create_base(name).eval()
    if not folder.exists():
        supernet = timm_autoslim.convert(model, base=name)
        plain = supernet.extract(supernet.space.uniform(0.5))
        timm_autoslim.calibrate(plain, [torch.rand(2, *plain.pretrained_cfg["input_size"])])
        timm_autoslim.export(plain, folder)
    return model
