"""Settings of the C library's allocator for the large blocks that PyTorch frees on a CPU."""

from __future__ import annotations

import ctypes
import platform

# Numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_blocks() -> None:
    """Keep freed blocks for reuse, for the rest of the process. Does nothing if the C library is not glibc.

    By default glibc returns every large block to the system and requests it again, with a page fault for every page.
    A training step of 70 M parameters took 4.7 s in float32 and 2.8 s in bfloat16 by default, and 4.1 and 2.6 s with
    this setting. The price: the process stays as large as its peak.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_blocks() -> None:
    """Return free memory to the system, for processes that wait between two jobs. Does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
