"""What the commands share that bring one more expert into a registered pool: `add`, and `registry import`."""

import os
from typing import Any

from jobs.terminal import Terminal, print_json, table
from pipeline.config import AddConfig, ConfigError, is_address
from pipeline.files import write_json
from pipeline.learning.adding import Added, add_task, stream_of
from pipeline.learning.opening import open_session
from pipeline.learning.progress import LoggedProgress, Progress
from pipeline.learning.session import StreamSession
from pipeline.learning.summary import session_provenance
from pipeline.models.target_modules import base_linears
from pipeline.provenance import now
from pipeline.registry.browsing import meant
from pipeline.registry.scores import scores_of
from pipeline.registry.successors import open_pool
from pipeline.registry.tracking import use_registry
from pipeline.routing.foreign import foreign_adapter


def add_to_pool(settings: AddConfig, pool: str, registry: str | None, *, replaces: bool, as_json: bool = False) -> None:
    """Adds a task to a pool of a registry; shows accuracies before and after, or prints the summary as JSON.

    The registry is the one that is named, else the configuration's, else $MLFLOW_TRACKING_URI, else the output folder's.
    """
    began = now()
    progress: Progress = LoggedProgress() if as_json else Terminal()
    given = {
        "--registry": registry,
        "registry.uri": settings.registry.uri,
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI"),
        "output": None if is_address(settings.output) else f"sqlite:///{settings.output}/mlflow.db",
    }
    setting, uri = next(((setting, uri) for setting, uri in given.items() if uri), ("", ""))
    if not uri:
        raise ConfigError(
            "name the pool's registry with --registry, registry.uri or MLFLOW_TRACKING_URI: `output` is an address"
        )
    use_registry(uri, setting)
    start = meant(pool)
    config = stream_of(settings, open_pool(start), uri)
    if settings.task.adapter is not None:  # now, not when Ray has started
        foreign_adapter(settings.task.adapter, base_linears(config.base))
    with open_session(config, job="add", progress=progress) as session:
        added = add_task(session, start, replaces=replaces)
        summary = _summary(session, added, session_provenance(session, began))
        write_json(session.folder / "summary.json", summary)
        _show(session, added)
    if as_json:
        print_json(summary)


def _summary(session: StreamSession, added: Added, provenance: dict[str, Any]) -> dict[str, Any]:
    return provenance | {
        "pool": added.version.name,
        "version": int(added.version.version),
        "before": int(added.before.version),
        "expert": f"{added.expert.name}/{added.expert.version}",
        "status": added.version.tags.get("status", ""),
        "accuracies": added.evaluation.accuracies(),
        "base_accuracies": added.base,
        "unknown_answers": added.unknown,
        "unmeasured": added.unmeasured,
        "undecided": added.undecided,
        "peak_memory_bytes": session.peak_memory(),
    }


def _show(session: StreamSession, added: Added) -> None:
    """Prints accuracies before and after, what could not be measured, and where to look."""
    before = {score.dataset: score.accuracy for score in scores_of(added.before)}
    rows = [
        [name, *("-" if value is None else f"{value:.3f}" for value in (added.base.get(name), before.get(name), now))]
        for name, now in added.evaluation.accuracies().items()
    ]
    columns = ["task or base ability", "base", f"version {added.before.version}", f"version {added.version.version}"]
    log = session.progress.log
    session.progress.show(table("Accuracy", columns, rows))
    for name, count in added.unknown.items():
        log(f"  {name}: {count} prompts go to experts whose answers to them are not known; they count as wrong")
    if added.unmeasured:
        log(f"  not measured, since the registry keeps no evaluation prompts of them: {', '.join(added.unmeasured)}")
    if added.undecided:
        log(f"  not measured, since the router chooses while it answers: {', '.join(added.undecided)}")
    name, number = added.version.name, added.version.version
    log(f"\nregistry   {name}/{number}, {added.version.tags.get('status', '')}")
    log(f"           pointsman registry diff {name}/{added.before.version} {name}/{number}")
    log(f"summary    {session.output.shown(session.folder / 'summary.json')}")
