"""How glibc's malloc treats memory that is freed."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, from glibc's malloc.h
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_memory() -> bool:
    """Let malloc keep freed memory for the next subnet, rather than return it and fault it in again, page by page.

    Subnets have activations of many sizes, so glibc's malloc would return memory all the time (docs/benchmarks.md has
    the cost). Other C libraries are left alone, and so is a malloc that the user has set by environment variables.

    Returns:
        Whether it was set.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))  # -1: never
