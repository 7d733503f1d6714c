"""A Ray cluster of several nodes on this machine, for trying out.

pointsman cluster up --nodes 3 --gpus 1     three nodes with a made-up GPU each
pointsman cluster status                    what runs, and how to use it
pointsman cluster down                      ends what `up` has started
"""

from jobs.lazy import Lazy, lazy_group

COMMANDS = {
    "up": Lazy("jobs.cluster.local:up", "Start nodes on this machine."),
    "status": Lazy("jobs.cluster.local:status", "Show what runs, and how to use it."),
    "down": Lazy("jobs.cluster.local:down", "End what `up` has started."),
}

app = lazy_group(COMMANDS, "A cluster of several nodes on this machine, for trying out.")
