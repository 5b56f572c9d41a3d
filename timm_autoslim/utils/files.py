"""Write files whole or not at all, so that a kill or a crash never leaves half a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the path of a draft; when the block ends, the draft takes the place of `path` in one step.

    Whoever reads `path` finds the old file or the new one, never a part of it, even after a kill. If the block raises,
    `path` stays as it was and the draft is removed.

    Args:
        path: the file to write; it need not exist.

    Raises:
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from timm_autoslim.files import replace_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replace_file(Path(folder, "table.csv")) as draft:
        ...         _ = draft.write_text("name,macs")
        ...     print(*(file.name for file in Path(folder).iterdir()))
        table.csv
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)  # safetensors writes files that only their owner can read
        sync_to_disk(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def lock_folder(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a folder against others who do, in this process or in another, until the block or the process ends.

    Args:
        folder: a folder that exists; nothing in it changes.
        wait: whether to wait for another who has the lock, or to go on without it.

    Yields:
        Whether the lock was taken. Where folders cannot be locked, as on Windows and on some network file systems, it
        never is, and nobody waits.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            locked = False
        else:
            locked = True
        yield locked
    finally:
        os.close(handle)  # which ends the lock


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Raises:
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from timm_autoslim.files import write_text
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder, "table.csv"), "name,macs")
        ...     print(Path(folder, "table.csv").read_text())
        name,macs
    """
    with replace_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Force a file or a folder to the disk.

    Call it before a rename: else the new name may survive a crash of the machine, and the content may not.

    Raises:
        OSError: there is no such file or folder.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from timm_autoslim.files import sync_to_disk
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sync_to_disk(Path(folder))
    """
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and need not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
