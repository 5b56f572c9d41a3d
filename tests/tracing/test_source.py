"""What the source of the code says."""

import sys
import types
from pathlib import Path

from timm_autoslim.tracing.source import find_tables, format_line

TABLE = {1: 2}
OWNER = types.SimpleNamespace(table={3: 4}, other=types.SimpleNamespace(keys={5, 6}))


def test_tables_are_names_attributes_and_what_is_written_there():
    inner = {7: 8}
    frame = sys._getframe()
    for tables, expected in (
        ((TABLE[1], find_tables(frame))[1], [TABLE]),
        ((3 in OWNER.table, find_tables(frame))[1], [OWNER.table]),
        ((OWNER.other.keys.__contains__(5), find_tables(frame))[1], [{5, 6}]),
        ((inner.get(7), find_tables(frame))[1], [inner]),
        (({1: inner, 2: 3}.get(1), find_tables(frame))[1], [{1, 2}]),
        ((1 in (1, 2), find_tables(frame))[1], []),
        ((dict(inner)[7], find_tables(frame))[1], []),
    ):
        assert tables == expected


def test_code_without_source_has_no_tables():
    scope = {}
    exec("def run(find, frame):\n    return {1: 2}.get(1) and find(frame())", scope)
    assert scope["run"](find_tables, sys._getframe) == []


def test_lines_are_named_from_the_working_directory():
    assert format_line(str(Path.cwd() / "tests" / "x.py"), 3) == f"{Path('tests/x.py')}:3"
    assert format_line("/nowhere/x.py", 3) == "/nowhere/x.py:3"
    assert format_line(sys.modules["torch"].__file__, 1) == f"{Path('torch/__init__.py')}:1"
