"""Whether a cluster has room for what a job asks for, before its workers start.

Ray asks for missing resources again and again, which looks like a hang. What can never be had is an error with the numbers;
what an autoscaler may still bring is waited for (`cluster.waiting`).
"""

from collections.abc import Callable, Sequence

from cluster.demand import Trainings, Worker
from cluster.nodes import Node, Supply, cluster_supply, totals
from pipeline.errors import UserError

READER_CPUS = 1
"""CPUs that reading rows takes beside inference: Ray Data starts workers first, and then waits for rows."""


class PreflightError(UserError):
    """The cluster or the machine lacks something; the message says what and how to get it."""


def check(supply: Supply, lacks: Callable[[Sequence[Node]], str | None]) -> None:
    """Raises PreflightError if the cluster lacks something with all that an autoscaler may add, too.

    `lacks` says what nodes lack, None if nothing.
    """
    reasons = [lacks(nodes) for nodes in supply.stages]
    if reasons[-1] is not None and None not in reasons:
        raise PreflightError(reasons[-1])


def check_inference(worker: Worker, workers: int, cpus_field: str) -> None:
    """Raises PreflightError if the connected cluster can never run so many evaluators (see `lacks_for_inference`)."""
    supply = cluster_supply()
    check(supply, lambda nodes: lacks_for_inference(worker, workers, nodes, supply, cpus_field))


def lacks_for_trainings(trainings: Trainings, nodes: Sequence[Node], supply: Supply) -> str | None:
    """Returns what nodes lack for these trainings, with numbers and remedies; None if nothing.

    Workers are placed on nodes one by one, so a worker must fit into one node, and the nodes together must hold all.
    """
    worker = trainings.worker
    found = f"the cluster has {_size(nodes, supply)}"
    if worker.gpus and not any(node.gpus for node in nodes):
        return _lines(
            f"{trainings}: there is no GPU; {found}",
            "set training.gpu=false",
            _larger(supply, "submit to a cluster with GPUs (--address)"),
        )
    if trainings.that_fit(nodes) < trainings.count:
        fitting = (
            trainings.workers_that_fit(nodes) * trainings.count
            if trainings.strategy.startswith("STRICT")
            else sum(worker.slots(node) for node in nodes)
        )
        return _lines(f"{trainings}: only {fitting} worker(s) fit; {found}", *_fewer(trainings, nodes), _larger(supply))
    needed, cpus = _cpus(trainings), sum(node.cpus for node in nodes)
    if needed > cpus:
        smaller = [
            *(["training.parallel_tasks"] if trainings.count > 1 else []),
            *(["training.workers"] if trainings.workers > 1 else []),
            *(["training.cpus_per_worker"] if worker.cpus > 1 else []),
        ]
        return _lines(
            f"{trainings}: {needed:g} CPUs in all; {found}",
            f"lower {', '.join(smaller)}" if smaller else None,
            f"a local Ray takes more logical CPUs than the machine has (connect(cpus={needed:g}))"
            if len(nodes) == 1
            else None,
            _larger(supply),
        )
    return None


def lacks_for_inference(
    worker: Worker, workers: int, nodes: Sequence[Node], supply: Supply, cpus_field: str = "training.cpus_per_worker"
) -> str | None:
    """Returns what nodes lack for so many evaluators and the reading of rows, with numbers and remedies; None if nothing.

    Ray would wait for the missing ones for ever. Image features and base prompts are read by the same number. `cpus_field` is
    the setting that gives a worker's CPUs.
    """
    slots = sum(worker.slots(node) for node in nodes)
    fitting = max(0, min(slots, int((sum(node.cpus for node in nodes) - READER_CPUS) // worker.cpus)))
    if fitting >= workers:
        return None
    return _lines(
        f"evaluation.workers={workers} with {worker}, and {READER_CPUS} CPU for reading rows: only {fitting} of them fit; "
        f"the cluster has {_size(nodes, supply)}",
        f"lower evaluation.workers to {fitting}" if fitting else None,
        "lower evaluation.gpus_per_worker" if worker.gpus > 1 else None,
        f"lower {cpus_field}" if worker.cpus > 1 else None,
        _larger(supply),
    )


def trainings_that_fit(trainings: Trainings, evaluator: Worker, evaluators: int, nodes: Sequence[Node]) -> int:
    """Returns how many trainings nodes hold at most beside evaluators, perhaps none.

    Each worker and each evaluator lies on one node. `trainings.extra_cpus` are for reading rows.
    """
    left = list(nodes)
    for _ in range(evaluators):
        free = [i for i, node in enumerate(left) if evaluator.slots(node)]
        if not free:
            return 0
        fullest = max(free, key=lambda i: (left[i].gpus, left[i].cpus))
        left[fullest] = left[fullest].without(evaluator.cpus, evaluator.gpus)
    cpus = sum(node.cpus for node in left) - trainings.extra_cpus
    return max(0, min(trainings.that_fit(left), int(cpus // (trainings.workers * trainings.worker.cpus))))


def _cpus(trainings: Trainings) -> float:
    return trainings.workers * trainings.count * trainings.worker.cpus + trainings.extra_cpus


def _size(nodes: Sequence[Node], supply: Supply) -> str:
    """Returns what nodes have together, and whether an autoscaler is counted in."""
    return totals(nodes) + (f" at most, with all that {supply.autoscaler} may add" if nodes is supply.at_most else "")


def _fewer(trainings: Trainings, nodes: Sequence[Node]) -> list[str]:
    """Returns what to lower so that trainings fit; where not even one worker does, what is in its way."""
    worker, workers = trainings.worker, trainings.workers_that_fit(nodes)
    if workers:
        alone = trainings.that_fit(nodes)
        return [
            *([f"lower training.parallel_tasks to {max(alone, 1)}"] if trainings.count > 1 else []),
            *([f"lower training.workers to {workers}"] if workers < trainings.workers else []),
            *(["lower training.cpus_per_worker"] if worker.cpus > 1 else []),
        ]
    if any(worker.slots(node) for node in nodes):  # some, but not one for each training
        return [f"lower training.parallel_tasks to {max(trainings.that_fit(nodes), 1)}"]
    right = [node for node in nodes if worker.may_lie_on(node)]
    if not right:
        return [f"no node has {worker.kind}: correct training.accelerator_type and training.label_selector"]
    with_gpus = [node for node in right if node.gpus >= worker.gpus]
    cpus = int(max((node.cpus for node in with_gpus), default=0))
    if not with_gpus:
        return [f"no node with {worker.kind or 'so many CPUs'} has {worker.gpus:g} GPU(s)"]
    return [f"lower training.cpus_per_worker to {cpus}, the CPUs of the largest such node"] if cpus else []


def _larger(supply: Supply, otherwise: str = "take a larger cluster (--address)") -> str:
    return f"raise {supply.maximum}" if supply.maximum else otherwise


def _lines(found: str, *remedies: str | None) -> str:
    """Returns a message: what is wrong, and in a second line what to do."""
    *others, last = [remedy for remedy in remedies if remedy]
    return f"{found}\n    {', '.join(others)}{', or ' if others else ''}{last}"
