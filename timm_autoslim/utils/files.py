"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; what is there at the block's end takes the place of `path`, in one step.

    If the block raises, `path` stays as it was, and nothing is left beside it.

    Raises:
        OSError: the folder cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors leaves files that only their owner can read
        sync_to_disk(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OSError: the folder cannot be written to.
    """
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Force a file or a folder to the disk, so that a rename cannot outlive its content in a crash of the machine."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and needs no such thing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
