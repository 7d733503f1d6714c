"""Who works on a run at an address: a claim, an object with owner, host and a sign of life, instead of a file lock.

Object stores cannot lock; all that is needed of them is that a file that was written is found by whoever lists the folder
afterwards. Everybody writes a claim of their own, then lists: who finds no other holds the run. Of two that write at the same
time at least one finds the other's; both withdraw then, and try again after a random moment. A claim without a sign of life
for STALE seconds, or of a process of this machine that is gone, is nobody's.
"""

import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from uuid import getnode, uuid4

import psutil

from pipeline.errors import UserError
from pipeline.storage.remote import RemoteFolder, StorageError

BEAT = 15.0
"""Seconds between two signs of life."""

STALE = 120.0
"""Seconds without a sign of life after which a claim is taken over."""

SETTLED = 1.0
"""Seconds after which a claim that still cannot be read is nobody's: not every file system shows a file whole or not at all."""

ATTEMPTS = 10
"""How often two that ask at the same time ask again."""


class ClaimedError(UserError):
    """Somebody else works there; `owner` says who, and since when."""

    def __init__(self, folder: RemoteFolder, owner: "Owner") -> None:
        super().__init__(
            f"{folder}: {owner} works on this run; wait for its end, or give this one a `name` of its own (a process that was "
            f"killed is replaced {STALE:.0f} s after its last sign of life)"
        )
        self.owner = owner


class LostError(UserError):
    """Somebody else has taken the run over."""


@dataclass(frozen=True)
class Owner:
    """Who has claimed a run."""

    host: str
    process: int
    since: str
    beat: str
    """Last sign of life; both in UTC."""
    holds: bool = False
    """Whether the run is its own; until then it asks."""
    machine: str = ""
    """Where its number is that of a process (see `this_machine`)."""

    @classmethod
    def read(cls, content: bytes) -> "Owner | None":
        """Returns the owner that a claim names; None for what is no claim."""
        try:
            known = {field.name for field in fields(cls)}  # a later release may write more
            return cls(**{name: value for name, value in json.loads(content).items() if name in known})
        except (ValueError, TypeError, AttributeError):
            return None

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since}, last sign of life {self.silent:.0f} s ago)"

    @property
    def silent(self) -> float:
        """Seconds since its last sign of life."""
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(self.beat)).total_seconds())

    @property
    def is_gone(self) -> bool:
        """Whether it counts as killed."""
        if self.machine == this_machine():
            try:
                began = psutil.Process(self.process).create_time()
            except psutil.NoSuchProcess:
                return True
            return began > datetime.fromisoformat(self.since).timestamp() + 1  # another one with its number
        return self.silent > STALE


@cache
def this_machine() -> str:
    """Names the processes among which this one has its number: those of a boot of a system, in containers of a namespace.

    Names of hosts do not: containers may share one, and so may machines.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return f"{getnode()} {psutil.boot_time():.0f}"


class Claim:
    """A run that this process works on; gives signs of life in a thread of its own while its context lasts."""

    def __init__(self, folder: RemoteFolder, name: str, owner: Owner) -> None:
        self._folder, self._name, self._owner = folder, name, owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go, name="claim", daemon=True)

    def __enter__(self) -> "Claim":
        self._folder.write(self._name, _content(self._owner, beat=_now()))
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raises LostError where somebody else has taken the run over meanwhile."""
        names = self._folder.files()
        others = (Owner.read(self._folder.read(name) or b"") for name in names if name != self._name)
        # A sign of life may have been given in the moment in which the claim was deleted.
        replaced = any(o is not None and o.holds and o.since > self._owner.since and not o.is_gone for o in others)
        if self._name not in names or replaced:
            raise LostError(
                f"{self._folder / '..'}: this process gave no sign of life for {STALE:.0f} s, and another one has taken the "
                "run over; end this one"
            )

    def _go(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(StorageError):  # it may answer the next time
                if not self._folder.exists(self._name):
                    return
                self._folder.write(self._name, _content(self._owner, beat=_now()))


def owner_of(folder: RemoteFolder) -> Owner | None:
    """Returns who works on the run whose claims lie in a folder; None if nobody does."""
    owners = (Owner.read(folder.read(name) or b"") for name in folder.files())
    return next((owner for owner in owners if owner is not None and owner.holds and not owner.is_gone), None)


@contextmanager
def claimed(folder: RemoteFolder) -> Iterator[Claim]:
    """Holds the claim of a run; raises ClaimedError where another process has it."""
    name, since = f"{uuid4().hex}.json", _now()
    owner = Owner(socket.gethostname(), os.getpid(), since, since, machine=this_machine())
    for attempt in range(ATTEMPTS):
        folder.write(name, _content(owner, beat=_now()))
        try:
            rival = _rival(folder, name)
            if rival is not None and rival.holds:
                raise ClaimedError(folder / "..", rival)
            if rival is None:
                break
        except BaseException:
            folder.delete([name])
            raise
        folder.delete([name])
        if attempt == ATTEMPTS - 1:
            raise ClaimedError(folder / "..", rival)
        time.sleep(random.uniform(0.1, 1.0))
    owner = replace(owner, holds=True)
    try:
        with Claim(folder, name, owner) as claim:
            yield claim
    finally:
        with suppress(StorageError):  # its own message has been given, and the claim becomes stale
            folder.delete([name])


def _rival(folder: RemoteFolder, own: str) -> Owner | None:
    """Returns another one that is alive, a holder before those that ask; deletes the claims of those that are gone."""
    alive: list[Owner] = []
    for name in folder.files():
        if name == own or not name.endswith(".json"):
            continue
        claim = _settled(folder, name)
        if claim is None:
            continue
        owner = Owner.read(claim)
        if owner is None or owner.is_gone:
            folder.delete([name])
        else:
            alive.append(owner)
    return max(alive, key=lambda owner: owner.holds, default=None)


def _settled(folder: RemoteFolder, name: str) -> bytes | None:
    """Returns a claim's content; one that cannot be read is looked at again: it may just now be written, or deleted."""
    until = time.monotonic() + SETTLED
    while True:
        late = time.monotonic() >= until
        try:
            content = folder.read(name)
        except StorageError:
            if late:
                raise
        else:
            if content is None or late or Owner.read(content) is not None:
                return content
        time.sleep(SETTLED / 10)


def _content(owner: Owner, *, beat: str) -> bytes:
    return (json.dumps(asdict(owner) | {"beat": beat}) + "\n").encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
