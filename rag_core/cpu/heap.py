"""How the C library treats large blocks that PyTorch frees on a CPU. It knows nothing of tensors."""

from __future__ import annotations

import ctypes
import platform

# Numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_blocks() -> None:
    """Keep freed blocks for the next use, for the rest of the process. Does nothing where the C library is not glibc.

    glibc gives every large block back to the system and asks for it anew, and every page of it is then a fault: a
    training step of 70 M parameters took 4.7 s in float32 and 2.8 s in bfloat16 with that, 4.1 and 2.6 s without. The
    price is that the process stays as large as it once was.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_blocks() -> None:
    """Give the system what is free now, for processes that wait between two jobs. Without glibc it does nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
