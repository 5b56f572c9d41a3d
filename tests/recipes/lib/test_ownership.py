"""One owner of a folder at a time, whatever becomes of the owners."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.recipes import RECIPES, launch_two, write_config
from helpers.subprocesses import run_apart

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.ownership import FolderInUseError, own_folder


def test_a_second_run_is_told_whose_the_folder_is(tmp_path):
    folder = tmp_path / "a" / "b"
    with own_folder(folder):
        text = rf"b is in use by .* \(process {os.getpid()} on .*\): wait for its end, or give another folder"
        with pytest.raises(FolderInUseError, match=text), own_folder(folder):
            pytest.fail("two owners")
        with own_folder(folder, lock=".other"), own_folder(tmp_path / "a" / "c"):
            pass
        (folder / "result").touch()
    with own_folder(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_in_which_nothing_is_left_is_not_left_either(tmp_path):
    with pytest.raises(KeyboardInterrupt), own_folder(tmp_path / "a" / "b"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def own_and_die(folder):
    with own_folder(folder):
        if os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(1)
        time.sleep(30)  # as a worker that loads images may outlive the process that is killed
        os._exit(0)


@pytest.mark.slow
def test_a_kill_gives_the_folder_free(tmp_path):
    assert run_apart(own_and_die, tmp_path / "run", cwd=tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "run" / ".lock").is_file()
    with own_folder(tmp_path / "run"):
        pass


def test_of_many_that_come_and_go_one_is_the_owner(tmp_path):
    owners, counts = [], {"owned": 0, "refused": 0}

    def try_often(name):
        for _ in range(60):
            try:
                with own_folder(tmp_path / "run"):  # which is removed at the end
                    owners.append(name)
                    assert owners == [name]
                    time.sleep(1e-4)
                    assert owners.pop() == name
                counts["owned"] += 1
            except FolderInUseError:
                counts["refused"] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(try_often, range(4)))
    assert counts["owned"]
    assert sum(counts.values()) == 240


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run cannot be written to"), own_folder(tmp_path / "file" / "run"):
        pytest.fail("not owned")


@pytest.mark.slow
def test_all_processes_of_a_second_training_stop_before_they_touch_anything(tmp_path):
    folder = tmp_path / "run"
    with own_folder(folder):
        command = ["-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", "run", "--resume"]
        done = launch_two(str(RECIPES / "train.py"), *command)
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert done.returncode
    assert done.stderr.count("FolderInUseError: ") == 2  # lines of two processes may run into each other
    assert done.stderr.count("run is in use by") == 2


def test_a_folder_that_its_owner_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    mkdir, calls = Path.mkdir, []

    def meet_another(path, **options):
        calls.append(path)
        if len(calls) == 1:  # it was there for mkdir, and is gone when mkdir asks whether it is a folder
            raise FileExistsError(17, "File exists", str(path))
        mkdir(path, **options)

    monkeypatch.setattr(Path, "mkdir", meet_another)
    with own_folder(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_refused(kind, tmp_path):
    path = tmp_path / "run"
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be written to"), own_folder(path):
        pass
