"""Rows that outlive a kill, and tables in a page."""

import pytest

from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table


def test_rows_are_read_again_without_the_one_that_a_kill_cut(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows = Results(path)
    rows.add({"name": "a"})
    rows.add({"name": "b"})
    assert list(Results(path)) == [{"name": "a"}, {"name": "b"}]
    path.write_text(path.read_text()[:-4])
    again = Results(path)
    assert list(again) == [{"name": "a"}]
    again.add({"name": "c"})
    assert path.read_text() == '{"name": "a"}\n{"name": "c"}\n'


def test_a_table_stands_between_the_markers_of_its_name(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- one -->\nold\n<!-- /one -->\n<!-- two -->\nkept\n<!-- /two -->\n")
    put_table(page, "one", "| new |\n")
    assert page.read_text() == "head\n<!-- one -->\n| new |\n<!-- /one -->\n<!-- two -->\nkept\n<!-- /two -->\n"


@pytest.mark.parametrize("text", ["no markers\n", "<!-- /one -->\n<!-- one -->\n"])
def test_a_page_without_markers_is_refused_and_kept(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match=r"page.md lacks the lines <!-- one --> and <!-- /one -->"):
        put_table(page, "one", "table")
    assert page.read_text() == text


def test_the_command_line_of_a_benchmark_names_its_rows_and_its_page():
    parser = make_parser("What it measures.", "runs/rows.jsonl")
    args = parser.parse_args(["--table", "page.md"])
    assert (str(args.results), str(args.table), args.only_table) == ("runs/rows.jsonl", "page.md", False)
    assert parser.description == "What it measures."
