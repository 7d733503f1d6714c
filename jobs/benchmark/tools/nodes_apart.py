"""A Ray cluster on this machine whose nodes do not see each other's files, as on a cluster without shared storage.

The head is a usual one. Every other node runs in a mount namespace of its own, in which the head's folder and all folders that
are named are empty. For benchmarks and tests; Linux alone knows such namespaces, and the system must allow them.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

from jobs.benchmark.tools.ray_head import Head, HeadError, ray_head, started_node

APART = "files"
"""Label of the nodes that see no file of the head, with the value `there`."""

_HIDE = 'for folder in "$@"; do mkdir -p "$folder" && mount -t tmpfs tmpfs "$folder" || exit 1; done; exec $START'


@contextmanager
def nodes_apart(
    cpus: Sequence[int], hidden: Sequence[Path] = (), environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Head]:
    """Starts nodes with so many logical CPUs each, the head first; all others see nothing of the head's folders `hidden`.

    `environment` is added to that of all nodes. Raises HeadError where a node does not start.
    """
    check_namespaces()
    token = Path(environment.get("HOME", Path.home())) / ".ray" / "auth_token"
    if token.is_file():  # the head demands it, and it may be hidden
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token.read_text().strip(), **environment}
    with ray_head(cpus[0], environment) as head, ExitStack() as nodes:
        # Not the whole temporary folder: Python itself may lie there.
        alone = [*_unshare(), "sh", "-c", _HIDE, "sh", *map(str, [head.folder, *hidden])]
        for number, count in enumerate(cpus[1:], 1):
            start = f"ray start --address={head.gcs} --block --num-cpus={count} --labels={APART}=there"
            start += " --node-ip-address=127.0.0.1 --disable-usage-stats"
            log = head.folder / f"node-{number}.log"
            nodes.enter_context(started_node(alone, log, {**environment, "START": start}))
        yield head


def check_namespaces() -> None:
    """Raises HeadError where this system makes no mount namespaces for this user."""
    try:
        subprocess.run([*_unshare(), "true"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise HeadError(
            f"nodes without a shared folder need Linux's mount namespaces (unshare --mount): {reason}"
        ) from None


def _unshare() -> list[str]:
    return ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
