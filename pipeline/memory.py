"""Memory that a long-lived process gives back between one task and the next."""

import ctypes
import gc

import torch


def free_memory() -> None:
    """Frees what an engine has left: engines are full of references in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_memory()


MAPPED_BYTES = 1 << 18
"""Blocks from this size on are mapped by themselves."""
_M_MMAP_THRESHOLD = -3


def map_large_blocks() -> None:
    """Has glibc map large blocks by themselves, so that they go back to the system when they are freed.

    It begins so, but raises the threshold up to 32 MB with what is freed. From then on large tensors lie on the heap, between
    small results that live longer, and the heap grows with every task. Source: mallopt(3), M_MMAP_THRESHOLD. Nothing happens
    where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)


def trim_memory() -> None:
    """Gives free pages of the heap back to the system, in milliseconds.

    glibc keeps them, and many small results between large ones make that more with every task. Nothing happens where the C
    library is another one.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
