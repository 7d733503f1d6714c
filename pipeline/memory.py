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


def trim_memory() -> None:
    """Gives free pages of the heap back to the system, in milliseconds.

    glibc keeps them, and many small results between large ones make that more with every task. Nothing happens where the C
    library is another one.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
