"""Plans the recomputation of a pool's statistics: the new identity of each expert, or why it cannot be recomputed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import TaskConfig, digest
from pipeline.data.errors import StreamError
from pipeline.data.sources.reader import first_records
from pipeline.errors import UserError
from pipeline.learning.changes import differences
from pipeline.learning.identity import DATA, Identity, is_of_statistics
from pipeline.learning.session import StreamSession
from pipeline.learning.stream_data import BASE_PROMPTS
from pipeline.routing.pool import PoolError
from pipeline.routing.trained import TrainedExpert, TrainedPool

BEFORE = "recomputed from"
"""Part of an expert whose earlier release did not write down what its training depended on: its name then."""

LOOKED_AT = 8
"""First rows of a task, times four, among which one that can be used shows that its rows are there."""


class MissingError(UserError):
    """Rows are missing from which statistics would be computed; nothing was changed."""


@dataclass(frozen=True)
class Renewal:
    """An expert and its identity after recomputation."""

    task: TaskConfig
    identity: dict[str, Any] | None = None
    """What it depends on with its new statistics; None where it has them already."""
    changes: tuple[str, ...] = ()
    """What the configuration says otherwise of its training: then `stream.on_change` decides what `learn` makes of it."""

    @property
    def digest(self) -> str:
        """Its name with its new statistics."""
        assert self.identity is not None
        return digest(self.identity)


def plan(session: StreamSession, old: TrainedPool, *, skip_missing: bool) -> list[Renewal]:
    """Returns the renewal of each expert of a pool; raises MissingError with all rows that are missing."""
    if old.base_fingerprint != session.fingerprint:
        raise PoolError(
            f"{old.folder}: made for base {old.base_label!r} with fingerprint {old.base_fingerprint}, base.path has "
            f"{session.fingerprint}; name the pool's own base"
        )
    if not old.experts:
        raise PoolError(f"{old.folder}: the pool holds no expert, so there are no statistics to recompute")
    tasks = {task.name: task for task in session.config.stream.tasks}
    renewals, missing = [], {}
    for name in old.experts:
        if name not in tasks:
            missing[name] = "no task of that name in stream.tasks"
            continue
        try:
            renewals.append(_renewal(session, tasks[name], old))
        except StreamError as error:
            missing[name] = str(error)
    gone = _base_prompts_gone(session)
    if gone or (missing and not skip_missing) or not renewals:
        raise MissingError(_message(old, missing, gone))
    for name, reason in missing.items():
        session.progress.log(f"  left out: {name}: {reason}")
    if later := [name for name in tasks if name not in old.experts]:
        session.progress.log(f"  not in the pool, so for `pointsman learn`: {', '.join(later)}")
    return renewals


def _renewal(session: StreamSession, task: TaskConfig, old: TrainedPool) -> Renewal:
    """Returns the renewal of a task's expert; raises StreamError if its rows are gone."""
    trained, names = old.expert(task.name), session.identity
    card, now = trained.card, names.settings(task)
    if card.identity:
        kept = card.identity | {name: value for name, value in now.items() if is_of_statistics(name)}
        if trained.up_to_date and digest(kept) == card.config_digest:
            return Renewal(task)
        _check_rows(session, task)
        parts = names.parts(task)
        changes = differences(*({n: v for n, v in p.items() if not is_of_statistics(n)} for p in (kept, parts)))
        if kept.get(DATA) != parts[DATA]:
            kept |= {f"{DATA} of statistics": parts[DATA]}
        return Renewal(task, kept, tuple(changes))
    _check_rows(session, task)
    if trained.up_to_date and card.config_digest == names.expert_before(task):
        return Renewal(task)
    changes = recorded_differences(names, task, trained, old.router)
    return Renewal(task, names.parts(task) | ({BEFORE: card.config_digest} if changes else {}), tuple(changes))


def recorded_differences(
    names: Identity, task: TaskConfig, trained: TrainedExpert, router: Mapping[str, Any]
) -> list[str]:
    """Returns what differs between a configuration and all that an earlier release wrote down of an expert's training.

    `router` are its pool's settings. Not written down were the learning rate, its schedule, clipping and precision.
    """
    card, expert, now = trained.card, names.config.expert, names.parts(task)
    trained_with = {
        DATA: card.data_fingerprint,
        "seed": card.seed,
        "expert.rank": card.rank,
        "expert.dropout": trained.adapter_config.get("lora_dropout"),
        "router.steps": router.get("steps"),
        "router.learning_rate": router.get("learning_rate"),
    }
    if expert.target_modules != "auto":
        trained_with["expert.target_modules"] = trained.adapter_config.get("target_modules")
    changes = differences(trained_with, {name: now[name] for name in trained_with})
    if card.alpha != expert.lora_alpha:
        changes.append(f"expert.alpha {card.alpha:g} -> {expert.lora_alpha:g}")
    if card.samples != (samples := expert.steps * expert.batch_size):
        changes.append(f"expert.steps x expert.batch_size {card.samples} -> {samples}")
    return changes


def _check_rows(session: StreamSession, task: TaskConfig) -> None:
    """Raises StreamError where a task's files are gone, or no image of its first rows is there."""
    assert task.train is not None, "checked where configurations are read"
    if next(first_records(task.train, session.data.demo_folder, task.prompt, LOOKED_AT), None) is None:
        raise StreamError(f"{task.train.path}: none of its first rows can be used (are their images there?)")


def _base_prompts_gone(session: StreamSession) -> str | None:
    """Returns why the base prompts cannot be read, or None."""
    try:
        _ = session.identity.base_prompts
    except StreamError as error:
        return str(error)
    return None


def _message(old: TrainedPool, missing: Mapping[str, str], gone: str | None) -> str:
    lines = [f"{old.folder}: statistics cannot be recomputed of all that they need, and nothing was done:"]
    lines += [f"    {name}: {reason}" for name, reason in missing.items()]
    lines += [f"    base prompts: {gone}"] if gone else []
    if missing:
        lines.append(
            "bring the rows back, or correct the task's `train` in the configuration; or leave these experts out with "
            "--skip-missing (the old pool stays as it is)"
        )
    if gone:
        lines.append(
            f"without stream.{BASE_PROMPTS} (stream.{BASE_PROMPTS}=null) the pool has no null expert, and sends prompts that "
            "are far from all tasks to the base"
        )
    return "\n".join(lines)
