"""Daemon threads with a result: the process can end without waiting for them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(action: Callable[[], T], *, name: str) -> Future[T]:
    """Runs `action` in a thread of this name; returns a future of its result or error.

    An executor's threads hold up the end of a process that was told to stop, for as long as they read.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
