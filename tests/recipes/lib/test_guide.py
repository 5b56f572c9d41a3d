"""README.md of a finished run."""

import pytest

from timm_autoslim.recipes.lib.guide import write_guide


@pytest.mark.parametrize("onnx", [False, True])
def test_the_guide_names_the_folders_that_are_there(tmp_path, onnx):
    (tmp_path / "table.md").write_text("| the table |\n")
    for between in (False, True):
        if between:
            (tmp_path / "between").mkdir()
        write_guide(tmp_path, ["macs-50pct-searched"], onnx)
        text = (tmp_path / "README.md").read_text()
        assert text.startswith(f"# {tmp_path.name}\n\n| the table |\n")
        assert f'"local-dir:{tmp_path}/exported/macs-50pct-searched"' in text
        assert ("`onnx/` |" in text, "`between/` |" in text) == (onnx, between)
        assert "{" not in text
