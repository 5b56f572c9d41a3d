"""Folders that appear under their names at once, with all that is in them, or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from timm_autoslim.errors import OutputExistsError
from timm_autoslim.utils.files import lock_folder, sync_to_disk


def refuse_existing(folder: Path) -> None:
    """Raise an OutputExistsError if there is something of this name."""
    if os.path.lexists(folder):
        text = f"{folder}: exists already, nothing was written; choose a new folder or remove this one"
        raise OutputExistsError(text)


@contextlib.contextmanager
def create_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to. It gets its name when the block ends well, and leaves no trace when it does not.

    A process that is killed leaves a hidden draft, which the next call with the same name removes.

    Raises:
        OutputExistsError: there is something of this name.
        OSError: the folder cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    new_parents = [parent for parent in folder.parents if not parent.exists()]  # nearest first
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        draft.mkdir(parents=True)
        with lock_folder(draft, wait=False):
            _remove_abandoned(folder)
            yield draft
            for path in (*draft.iterdir(), draft):
                sync_to_disk(path)
            refuse_existing(folder)  # a rename would silently replace an empty folder
            try:
                os.rename(draft, folder)
            except OSError:
                refuse_existing(folder)  # another process was quicker
                raise
        sync_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _remove_abandoned(folder: Path) -> None:
    """Remove the drafts of this folder whose processes were killed."""
    draft_name = re.compile(re.escape(f".{folder.name}.") + "[0-9a-f]{32}")
    for path in folder.parent.iterdir():
        if draft_name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with lock_folder(path, wait=False) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
