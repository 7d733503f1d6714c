"""How a job ends before it is done: by a signal, or by a mistake of its user."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import psutil
import typer

from pipeline.config import without_secrets
from pipeline.errors import UserError
from pipeline.learning.outside_errors import outside_errors

MOMENT = 0.5
"""Seconds within which a second signal is the same one."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped:
    """Which signal has stopped this process."""

    def __init__(self) -> None:
        self.signal = signal.SIGINT
        self.times = 0
        self._last = -math.inf

    @property
    def exit_code(self) -> int:
        """By the shell's rule: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Unwinds the job the first time, ends the process the second time.

        Some supervisors signal a process, then its group: what comes within a moment is the same wish.
        """
        now, before = time.monotonic(), self._last
        self._last = now
        if now - before < MOMENT:
            return
        self.signal = signal.Signals(number)
        self.times += 1
        if self.times > 1:
            os._exit(self.exit_code)
        raise KeyboardInterrupt

    def end(self) -> NoReturn:
        """Ends the process with its exit code, at once after a signal: all that matters is closed.

        Ray's own end, which Python would wait for, ends a process with 1 where a thread still reads. The kernel ends Ray's
        processes with the one that has started them, but not those that they have started themselves.
        """
        if self.times:
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    for below in child.children(recursive=True):
                        below.kill()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_code)
        sys.exit(self.exit_code)


@contextmanager
def stoppable() -> Iterator[Stopped]:
    """Makes SIGINT and SIGTERM raise KeyboardInterrupt in the main thread, once; yields which it was."""
    stopped = Stopped()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals are the main thread's
        return
    before = {number: signal.signal(number, stopped.handle) for number in SIGNALS}
    try:
        yield stopped
    finally:
        if not stopped.times:  # else a second signal must end what is still being cleaned up
            for number, handler in before.items():
                signal.signal(number, handler)


def message_of(error: UserError) -> str:
    """Returns the message of an error, without secrets and the traceback that Ray adds to one from another process."""
    return without_secrets(str(getattr(error, "cause", error)))


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the job as its user needs it: a mistake is a message and exit code 2, a signal its own exit code.

    The first SIGINT or SIGTERM unwinds the job, so that it can say and store where it stands; the second ends it at once.
    """
    with stoppable() as stopped:
        try:
            with outside_errors():
                yield
        except UserError as error:
            typer.secho(f"error: {message_of(error)}", fg=typer.colors.RED, err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            stopped.end()
