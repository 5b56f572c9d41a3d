"""recipes/benchmarks/results.py: rows that outlive a kill, and tables in a page."""

import importlib.util

import pytest
import timm
import torch
from helpers.recipes import RECIPES


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", RECIPES / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_read_again_without_the_one_that_a_kill_cut(results, tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows = results.Results(path)
    rows.add({"name": "a"})
    rows.add({"name": "b"})
    assert list(results.Results(path)) == [{"name": "a"}, {"name": "b"}]
    path.write_text(path.read_text()[:-4])
    again = results.Results(path)
    assert list(again) == [{"name": "a"}]
    again.add({"name": "c"})
    assert path.read_text() == '{"name": "a"}\n{"name": "c"}\n'


def test_a_table_stands_between_the_markers_of_its_name(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- one -->\nold\n<!-- /one -->\n<!-- two -->\nkept\n<!-- /two -->\n")
    results.put_table(page, "one", "| new |\n")
    assert page.read_text() == "head\n<!-- one -->\n| new |\n<!-- /one -->\n<!-- two -->\nkept\n<!-- /two -->\n"


@pytest.mark.parametrize("text", ["no markers\n", "<!-- /one -->\n<!-- one -->\n"])
def test_a_page_without_markers_is_refused_and_kept(results, tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match=r"page.md lacks the lines <!-- one --> and <!-- /one -->"):
        results.put_table(page, "one", "table")
    assert page.read_text() == text


def test_an_exported_half_is_kept(results, tmp_path):
    whole = results.export_half("test_vit", tmp_path / "half")
    first = (tmp_path / "half" / "model.safetensors").read_bytes()
    again = results.export_half("test_vit", tmp_path / "half")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "half" / "model.safetensors").read_bytes() == first
    half = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True)
    assert half.pos_embed.shape[-1] == whole.pos_embed.shape[-1] // 2
