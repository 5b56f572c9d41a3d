"""Rows of results that outlive a stopped benchmark, and tables in a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from timm_autoslim import files


class Results(list[dict[str, Any]]):
    """Rows of a benchmark, one JSON line each in a file: a benchmark that is started again goes on with the rest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # the last line was cut when the benchmark was killed
            files.write_text(path, complete)
        super().__init__(json.loads(line) for line in complete.splitlines())

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, to the file too."""
        self.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def make_parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Return the command line of a benchmark that keeps its rows in a file, by default `results`, and makes a table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(results), help="rows; what is there is not done again")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    parser.add_argument("--only-table", action="store_true", help="measure nothing")
    return parser


def put_table(page: Path, name: str, text: str) -> None:
    """Replace what stands in a page between the lines <!-- NAME --> and <!-- /NAME -->."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, opened, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise SystemExit(f"{page} lacks the lines {begin.strip()} and {end}: the table goes between them")
    files.write_text(page, f"{before}{begin}{text.strip()}\n{end}{after}")
