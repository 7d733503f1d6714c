"""The expert of a task: the one that its data and settings name, or an earlier one.

A run keeps the card of each task's expert. If data or settings differ from it, the differences are shown and
`stream.on_change` decides. If the data are gone, the expert that was learned from them is kept.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import LearnConfig, SourceConfig, TaskConfig
from pipeline.config.loading import field_path
from pipeline.data.errors import StreamError
from pipeline.data.sources.files import check_there
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.learning.identity import ADAPTER, DATA, is_of_statistics
from pipeline.learning.session import StreamSession
from pipeline.learning.state import read_json
from pipeline.models.target_modules import check_target_modules
from pipeline.routing.expert import CARD, ExpertCard
from pipeline.routing.foreign_config import ForeignAdapterError
from pipeline.routing.pool import EXPERTS

SHOWN = 40
"""Characters of a value that are shown."""


class ChangedError(UserError):
    """A task that was learned from other data or with other settings, where `stream.on_change` is `fail`."""


def check_tasks(session: StreamSession) -> None:
    """Checks all tasks before anything is trained or evaluated: what would end the stream at a later task is raised now.

    ConfigError where `expert.target_modules` matches nothing, ForeignAdapterError where a given LoRA cannot be an expert of the
    base, StreamError where data are missing that are needed, ChangedError where a task has changed and `stream.on_change` is
    `fail`.
    """
    stream = session.config.stream
    check_target_modules(session.config.base, session.config.expert.target_modules)
    for task in stream.tasks:
        assert task.train is not None, "checked where configurations are read"
        if _remembered(session, task) is None:
            check_source(session, task.train, f"task {task.name!r}, train")
            if task.adapter is not None:
                session.identity.given_adapter(task.adapter)
        else:
            _decide(session, task)
        check_source(session, task.eval, f"task {task.name!r}, eval")
    for benchmark in stream.benchmarks:
        check_source(session, benchmark.eval, f"benchmark {benchmark.name!r}, eval")
    if stream.base_prompts is not None:
        check_source(session, stream.base_prompts, "stream.base_prompts")


def check_source(session: StreamSession, source: SourceConfig, whose: str) -> None:
    """Raises StreamError, which begins with `whose`, where a source has no files."""
    try:
        check_there(source, session.data.demo_folder)
    except StreamError as error:
        raise StreamError(f"{whose}: {error}") from None


def expert_wanted(session: StreamSession, task: TaskConfig) -> str:
    """Returns the name of a task's expert, and shows what has changed since it was learned.

    Raises ChangedError where `stream.on_change` is `fail`, StreamError if the data are missing and no expert was learned from
    them.
    """
    digest, notice = _decide(session, task)
    if notice:
        session.progress.log(notice)
    return digest


def _decide(session: StreamSession, task: TaskConfig) -> tuple[str, str]:
    """Returns the name of a task's expert, and a notice of what has changed; empty if nothing has."""
    remembered = _remembered(session, task)
    try:
        key = session.identity.expert(task)
    except (StreamError, ForeignAdapterError) as error:
        return _without_data(session, task, remembered, error)
    if remembered is None or remembered["config_digest"] in {key, session.identity.expert_before(task)}:
        return str(remembered["config_digest"]) if remembered else key, ""
    before, now, policy = remembered.get("identity", {}), session.identity.parts(task), session.config.stream.on_change
    changes = differences(before, now)
    alike = bool(before) and all(before.get(name) == value or is_of_statistics(name) for name, value in now.items())
    what = f"task {task.name!r} was learned with other data or settings: {'; '.join(changes)}"
    if policy == "fail":
        raise ChangedError(
            f"{what}; undo the change, or choose what happens: stream.on_change=retrain trains the task again, "
            "stream.on_change=keep leaves its expert as it is"
        )
    if policy == "keep":
        return str(remembered["config_digest"]), f"  {what}; its expert is kept (stream.on_change: keep)"
    notice = f"  {what}; it is trained again (stream.on_change: retrain), the earlier expert stays in the registry" + (
        "; only statistics depend on these: `pointsman recompute-statistics` recomputes them without training" * alike
    )
    return key, notice


def remember(session: StreamSession, card: ExpertCard) -> None:
    """Stores the card of a task's expert in the run's folder."""
    file = _file(session.folder, card.task)
    kept = {"config_digest": card.config_digest, "identity": card.identity}
    if not file.exists() or read_json(file) != kept:
        write_json(file, kept)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the differences between an expert's identity and the present one, one text each."""
    if not before:
        return ["its data or settings have changed since an earlier release wrote it"]
    changes = []
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) == now.get(name):
            continue
        if name == DATA:
            changes.append("its data have changed")
        elif name == ADAPTER:
            changes.append("the LoRA that it is given has changed")
        elif name == "base":
            changes.append("the base or how it is loaded has changed (base.path, dtype, attention)")
        else:
            changes.append(
                f"{field_path(name, LearnConfig)} {str(before.get(name))[:SHOWN]} -> {str(now.get(name))[:SHOWN]}"
            )
    return changes


def _without_data(
    session: StreamSession,
    task: TaskConfig,
    remembered: dict[str, Any] | None,
    error: StreamError | ForeignAdapterError,
) -> tuple[str, str]:
    """Returns the name of the expert that was learned from data that are gone, or raises the error of reading them."""
    if remembered is None:
        raise error
    now, before = session.identity.settings(task), dict(remembered.get("identity", {}))
    for part in (DATA, ADAPTER):
        before.pop(part, None)
    if before and (changes := differences(before, now)) and session.config.stream.on_change != "keep":
        raise StreamError(
            f"{error}; its expert was learned with other settings ({'; '.join(changes)}), so that the data are needed again: "
            "bring them back, undo the change, or set stream.on_change=keep"
        ) from None
    gone = "its training data are" if isinstance(error, StreamError) else "training data or adapter are"
    notice = f"  {task.name}: {gone} gone ({error}); the expert that was learned from them is kept"
    return str(remembered["config_digest"]), notice


def _remembered(session: StreamSession, task: TaskConfig) -> dict[str, Any] | None:
    # Earlier releases kept no note of it, but the expert's own card.
    files = _file(session.folder, task.name), session.folder / EXPERTS / task.name / CARD
    return next((read_json(file) for file in files if file.exists()), None)


def _file(folder: Path, task: str) -> Path:
    return folder / "state" / f"expert-{task}.json"
