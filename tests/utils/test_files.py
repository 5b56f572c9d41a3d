"""Files are replaced in one step, and a failed write leaves the old file and nothing beside it."""

import threading

import pytest

import timm_autoslim.files as public
from timm_autoslim.utils import files
from timm_autoslim.utils.files import lock_folder, replace_file, sync_to_disk, write_text


def test_a_text_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "file"
    for text in ("old", "new, and longer: 1 µs"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail():
        with replace_file(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_the_old_file_stays_until_the_draft_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")
    contents = []
    monkeypatch.setattr(files, "sync_to_disk", lambda draft: contents.append((path.read_text(), draft.read_text())))
    write_text(path, "new")
    assert contents == [("old", "new")]
    assert path.read_text() == "new"


def test_a_written_file_has_the_rights_that_any_new_file_has(tmp_path):
    (tmp_path / "new").touch()
    with replace_file(tmp_path / "file") as draft:
        draft.chmod(0o600)  # as safetensors does
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_missing_folder_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "missing" / "file"):
        pytest.fail("the block must not be entered")


def test_files_and_folders_are_synced(tmp_path):
    write_text(tmp_path / "file", "text")
    sync_to_disk(tmp_path / "file")
    sync_to_disk(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_to_disk(tmp_path / "missing")


def test_the_public_module_offers_the_same_functions():
    assert [getattr(public, f.__name__) for f in (replace_file, write_text, sync_to_disk)] == [
        replace_file,
        write_text,
        sync_to_disk,
    ]


def test_who_locks_a_folder_second_waits_for_the_end_of_the_first_block(tmp_path):
    order = []

    def wait():
        with lock_folder(tmp_path):
            order.append("second")

    other = threading.Thread(target=wait)
    with lock_folder(tmp_path):
        other.start()
        other.join(0.1)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass
