import os
from contextlib import suppress

import psutil
import pytest
import ray
import ray.data

from cluster.local import SPARE_CPUS, ClusterError, ClusterInfo, available_cpus, connect

pytestmark = pytest.mark.ray

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_has_logical_cpus_beyond_the_real_ones(local_ray: ClusterInfo) -> None:
    assert local_ray.started
    assert local_ray.nodes == 1
    assert local_ray.cpus == available_cpus() + SPARE_CPUS
    assert local_ray.dashboard is not None
    assert local_ray.logs.is_dir()


def test_listens_on_loopback_only(local_ray: ClusterInfo) -> None:
    me = psutil.Process()
    listening = set()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # idle workers come and go
            listening |= {s.laddr.ip for s in process.net_connections("tcp") if s.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= LOOPBACK


def test_settings_reach_workers_and_threads_follow_booked_cpus(local_ray: ClusterInfo) -> None:
    environment = ray.get(ray.remote(num_cpus=2)(lambda: dict(os.environ)).remote())
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["RAY_DATA_DISABLE_PROGRESS_BARS"] == "1"
    assert environment["OMP_NUM_THREADS"] == "2"


def test_data_keep_their_order_and_the_terminal_stays_quiet(local_ray: ClusterInfo, capfd) -> None:
    rows = ray.data.range(64, override_num_blocks=8).map(lambda row: {"x": 2 * row["id"]}).take_all()
    assert [row["x"] for row in rows] == list(range(0, 128, 2))
    assert capfd.readouterr() == ("", "")


def test_connecting_again_returns_the_same_cluster(local_ray: ClusterInfo) -> None:
    again = connect()
    assert again.address == local_ray.address
    assert not again.started


def test_a_start_that_takes_too_long_is_a_clear_error_and_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()

    def start(error: Exception) -> None:
        def init(**settings: object) -> None:
            raise error

        monkeypatch.setattr(ray, "init", init)
        connect()

    with pytest.raises(ClusterError, match="Ray did not start on this machine: The current node timed out"):
        start(Exception("The current node timed out during startup."))
    with pytest.raises(ClusterError, match="no reason given"):
        start(Exception())
    with pytest.raises(ValueError, match="ports"):
        start(ValueError("ports"))
