"""The public module of files: what is written is there whole, or not at all."""

import pytest

from timm_autoslim import files


def write_and_stop(path):
    with files.replace_file(path) as draft:
        draft.write_text("two\n")
        raise KeyboardInterrupt


def test_a_file_is_replaced_when_the_block_ends_and_stays_as_it_was_when_it_raises(tmp_path):
    path = tmp_path / "table.csv"
    files.write_text(path, "one\n")
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(path)
    assert path.read_text() == "one\n"
    with files.replace_file(path) as draft:
        draft.write_text("three\n")
        files.sync_to_disk(draft)
    assert path.read_text() == "three\n"
    assert list(tmp_path.iterdir()) == [path]
