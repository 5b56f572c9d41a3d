"""An export that is killed at any moment leaves no folder, or a whole one; what it leaves hidden goes with the next."""

import os
import signal

import pytest
import timm
from helpers.comparisons import same, state
from helpers.exported import slim

from timm_autoslim import check_folder
from timm_autoslim.artifact import export as artifact
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.load import build_slimmed


def dying(model, out, step):
    """Export in a process that dies by SIGKILL at a step of writing: with half of the weights, or before the step."""
    save = artifact.save_file

    def die(*args, **kwargs):
        if step == "save_file":
            save(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        setattr(artifact.os if step == "rename" else artifact, step, die)
        try:
            export(model, out)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
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
    export(build_slimmed(slim("test_vit").autoslim), tmp_path / "out2")
    assert living.exists()
