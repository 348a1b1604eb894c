"""Keep freed memory for the next array, instead of giving it back and having every page zeroed again.

numpy's temporaries are a megabyte or so, which glibc takes from the system and returns each time: measured on a
verification, a third of all processor time was the kernel's page faults. The memory held is what was in use at the
peak; that bound is tested.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # HEAP_MAX_SIZE / 2; glibc takes no more


def keep_freed_memory() -> None:
    """For the whole process. Does nothing where the C library has no `mallopt`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
