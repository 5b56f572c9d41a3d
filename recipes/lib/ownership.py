"""One owner of a folder at a time: two runs in one folder would write each other's files."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_autoslim.errors import AutoSlimError, ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HANDLES: set[int] = set()  # of the locks of this process


class FolderInUseError(AutoSlimError, BlockingIOError):
    """Another process is at work in the folder; nothing was touched."""


@contextlib.contextmanager
def own_folder(folder: Path, accelerator: Accelerator | None = None, *, lock: str = ".lock") -> Iterator[None]:
    """Keep all other runs out of a folder until the block ends, or the process ends in whatever way.

    The folder is made if it is not there, and removed again if the block leaves nothing in it. Windows has no such
    locks; there, and on a file system without them, the folder is not protected.

    Args:
        folder: to be owned.
        accelerator: Accelerate's; its main process locks for all of them, and all raise the same error.
        lock: name of the file that is locked. Runs that lock different files do not exclude each other.

    Raises:
        FolderInUseError: another run owns the folder.
        ConfigError: the folder cannot be written to.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    handle: int | None = None
    errors: list[AutoSlimError | None] = [None]
    if accelerator is None or accelerator.is_main_process:
        try:
            handle = _lock(folder, folder / lock)
        except FolderInUseError as error:
            errors = [error]
        except OSError as error:
            errors = [ConfigError(f"{folder} cannot be written to: {error}")]
    if accelerator and accelerator.num_processes > 1:
        broadcast_object_list(errors)
    if errors[0]:
        raise errors[0]
    try:
        yield
    finally:
        if handle in _HANDLES:  # not in a forked copy of the process
            (folder / lock).unlink(missing_ok=True)  # before others can lock it
            _close(handle)
            for path in new_folders:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _lock(folder: Path, path: Path) -> int:
    """Lock a file, and write into it who has it; returns its handle."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if folder.exists() or folder.is_symlink():  # a file
                raise
            continue  # the owner before has just removed the folder that was there
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the owner before has just removed the folder
            continue
        _HANDLES.add(handle)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 500, 0).decode(errors="replace").strip() or "another process"
            _close(handle)
            raise FolderInUseError(
                f"{folder} is in use by {owner}: wait for its end, or give another folder."
            ) from None
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}): start no second run in it.", stacklevel=3)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        _close(handle)  # the owner before has just removed the file
    os.ftruncate(handle, 0)
    os.write(handle, f"{Path(sys.argv[0]).name or 'Python'} (process {os.getpid()} on {socket.gethostname()})".encode())
    return handle


def _close(handle: int) -> None:
    _HANDLES.remove(handle)
    os.close(handle)


def _forget_locks() -> None:
    """Close the locks in a forked copy, such as a worker that loads images: it may outlive a process that is killed."""
    for handle in list(_HANDLES):
        _close(handle)


if fcntl:
    os.register_at_fork(after_in_child=_forget_locks)
