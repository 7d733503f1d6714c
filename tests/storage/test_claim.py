"""One process works on a run at an address; those that were killed are replaced."""

import json
import os
import socket
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.storage import claim as claims
from pipeline.storage.claim import ClaimedError, LostError, Owner, claimed, owner_of, this_machine
from pipeline.storage.remote import RemoteFolder


def of_another(
    remote: RemoteFolder,
    *,
    silent: float,
    host: str = "elsewhere",
    process: int = 7,
    machine: str = "another",
    holds: bool = True,
    since: datetime = datetime(2026, 1, 1, tzinfo=UTC),  # noqa: B008
) -> None:
    beat = datetime.now(UTC) - timedelta(seconds=silent)
    owner = Owner(host, process, since.isoformat(), beat.isoformat(), holds, machine)
    remote.write("other.json", json.dumps(asdict(owner)).encode())


def test_a_run_is_claimed_once(remote: RemoteFolder) -> None:
    folder = remote / "demo/claims"
    with claimed(folder):
        owner = owner_of(folder)
        assert owner is not None
        assert (owner.host, owner.process) == (socket.gethostname(), os.getpid())
        said = rf"there/demo: process {os.getpid()} on .* \(since 20.*ago\) works on"
        with pytest.raises(ClaimedError, match=said), claimed(folder):
            pass
        assert len(folder.files()) == 1
    assert folder.files() == {}
    assert owner_of(folder) is None


def test_who_is_silent_is_replaced(remote: RemoteFolder) -> None:
    of_another(remote, silent=claims.STALE - 20)
    with pytest.raises(ClaimedError, match=r"process 7 on elsewhere .* last sign of life 1\d\d s ago"), claimed(remote):
        pass
    of_another(remote, silent=claims.STALE + 10)
    with claimed(remote):
        assert len(remote.files()) == 1


def test_a_process_of_this_machine_that_is_gone_is_replaced_at_once(remote: RemoteFolder) -> None:
    of_another(remote, silent=1, machine=this_machine(), process=4_000_000)
    with claimed(remote):
        assert owner_of(remote).process == os.getpid()


def test_a_process_of_another_machine_of_this_name_is_not_taken_for_gone(remote: RemoteFolder) -> None:
    """Two containers may have the name of their host, and processes that the other does not see."""
    of_another(remote, silent=1, host=socket.gethostname(), process=4_000_000)
    with pytest.raises(ClaimedError, match="process 4000000 on"), claimed(remote):
        pass


def test_a_claim_of_a_later_release_is_a_claim(remote: RemoteFolder) -> None:
    of_another(remote, silent=1)
    remote.write("other.json", (remote.read("other.json") or b"").replace(b"{", b'{"more": 1, '))
    with pytest.raises(ClaimedError, match="process 7 on elsewhere"), claimed(remote):
        pass


def test_who_was_replaced_hears_of_it(remote: RemoteFolder) -> None:
    with claimed(remote) as claim:
        claim.check()
        remote.delete(remote.files())  # by another process, which took it for killed
        with pytest.raises(LostError, match="another one has taken the run over"):
            claim.check()


def test_who_holds_a_run_gives_signs_of_life(remote: RemoteFolder, monkeypatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    with claimed(remote) as claim:
        first = owner_of(remote).beat
        until = time.monotonic() + 20
        while owner_of(remote).beat == first:
            assert time.monotonic() < until
            time.sleep(0.05)
        of_another(remote, silent=1, holds=False)
        claim.check()
        of_another(remote, silent=1, since=datetime.now(UTC))
        with pytest.raises(LostError):
            claim.check()


def test_a_damaged_claim_is_nobodys(remote: RemoteFolder) -> None:
    remote.write("x.json", b"{")
    with claimed(remote):
        assert len(remote.files()) == 1


def test_of_many_at_once_one_holds(remote: RemoteFolder, monkeypatch) -> None:
    monkeypatch.setattr(claims.random, "uniform", lambda low, high: claims.random.random() * 0.1)
    holding, most, done = 0, 0, []
    lock = threading.Lock()

    def ask() -> None:
        nonlocal holding, most
        try:
            with claimed(remote):
                with lock:
                    holding += 1
                    most = max(most, holding)
                time.sleep(0.3)
                with lock:
                    holding -= 1
            done.append("held")
        except ClaimedError:
            done.append("refused")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert "held" in done
    assert remote.files() == {}
