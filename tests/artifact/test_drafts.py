"""An export that is killed at any moment leaves no folder, or a complete one; its hidden draft goes with the next."""

import os
import signal

import pytest
import timm
from helpers.comparisons import same, state
from helpers.exported import slim

from timm_autoslim import check_folder
from timm_autoslim.artifact import drafts, folder
from timm_autoslim.artifact import export as exporting
from timm_autoslim.artifact.build import build_slim
from timm_autoslim.artifact.drafts import create_folder
from timm_autoslim.artifact.export import export
from timm_autoslim.errors import OutputExistsError


def test_a_folder_appears_when_its_block_ends(tmp_path):
    with create_folder(tmp_path / "new" / "out") as draft:
        (draft / "file").touch()
        assert not (tmp_path / "new" / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "out", "file"]
    with pytest.raises(OutputExistsError, match="exists already"), create_folder(tmp_path / "new" / "out"):
        pass
    with pytest.raises(KeyboardInterrupt), create_folder(tmp_path / "other" / "out"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


STEPS = {"save_file": folder, "sync_to_disk": drafts, "rename": os, "write_card": exporting}  # by name, where it stands


def dying(model, out, step):
    """Export in a process that dies by SIGKILL at a step of writing: with half of the weights, or before the step."""
    save = folder.save_file

    def die(*args, **kwargs):
        if step == "save_file":
            save(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        setattr(STEPS[step], step, die)
        try:
            export(model, out)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.slow
@pytest.mark.parametrize("step", ["save_file", "write_card", "sync_to_disk", "rename"])
def test_a_killed_export_leaves_no_folder_and_the_next_one_tidies_up(step, tmp_path):
    model = slim("test_vit")
    assert dying(model, tmp_path / "out", step) == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    export(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_folder(tmp_path / "out")
    assert same(state(model), state(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)))


@pytest.mark.slow
def test_the_draft_of_a_living_export_and_other_hidden_folders_stay(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    living, other = tmp_path / f".out.{'0' * 32}", tmp_path / ".out.mine"
    living.mkdir()
    other.mkdir()
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        export(slim("test_vit"), tmp_path / "out")
    finally:
        os.close(handle)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, other.name, "out"])
    export(build_slim(slim("test_vit").autoslim), tmp_path / "out2")
    assert living.exists()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output_is_refused_and_untouched(kind, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="exists already, nothing was written"):
        export(slim("torchvision/squeezenet1_1"), out)
    assert os.listdir(tmp_path) == ["out"]
    if kind == "folder":
        assert [path.name for path in out.iterdir()] == ["mine.txt"]
        assert (out / "mine.txt").read_text() == "mine"
    elif kind == "file":
        assert out.read_text() == "mine"
    else:
        assert out.is_symlink()


@pytest.mark.parametrize("step", ["save_file", "write_card", "sync_to_disk"])
@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt("stop")])
def test_a_failed_write_leaves_nothing(step, fault, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise fault

    model = slim("torchvision/squeezenet1_1")
    monkeypatch.setattr(STEPS[step], step, fail)
    with pytest.raises(type(fault), match=str(fault)):
        export(model, tmp_path / "new" / "parent" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    def race(*args, **kwargs):
        (tmp_path / "out").mkdir()
        return "card"

    model = slim("torchvision/squeezenet1_1")
    monkeypatch.setattr(exporting, "write_card", race)
    with pytest.raises(OutputExistsError):
        export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


def test_a_process_that_was_quicker_keeps_its_folder(tmp_path, monkeypatch):
    model = slim("test_vit")
    rename = os.rename

    def late(draft, folder):
        folder.mkdir()
        (folder / "theirs").touch()
        rename(draft, folder)

    monkeypatch.setattr("os.rename", late)
    with pytest.raises(OutputExistsError, match="exists already"):
        export(model, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
