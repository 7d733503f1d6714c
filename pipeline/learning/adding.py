"""Adds one task to a registered pool: months later, on another machine, from the registry alone and without earlier data.

Experts are independent, so several people may add to one pool at the same time: whoever registers second takes in what came
between (`registry.merging`). Earlier tasks and base abilities are measured on the evaluation prompts that the
registry keeps (`evaluated_prompts`): the new pool's router chooses again, the answers are known.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.config import (
    AddConfig,
    BaseModelConfig,
    Config,
    DataConfig,
    ExpertConfig,
    LearnConfig,
    RouterConfig,
    StreamConfig,
    without_secrets,
)
from pipeline.config.adding import OF_TRAINING
from pipeline.errors import UserError
from pipeline.evaluation.recorded import evaluate_recorded
from pipeline.evaluation.results import Evaluation
from pipeline.learning.catalog import Catalog
from pipeline.learning.changes import check_tasks, differences
from pipeline.learning.registering import RegisteredExpert, registered_expert
from pipeline.learning.session import StreamSession
from pipeline.learning.trainings import Trainings
from pipeline.models.checkpoints import BaseError, checkpoint, fingerprint
from pipeline.registry.bases import base_folder
from pipeline.registry.experts import card_of, reference_to
from pipeline.registry.merging import merged, unseen_changes
from pipeline.registry.promotion import REFUSED, deciding
from pipeline.registry.successors import (
    Registered,
    base_of,
    newest_with,
    open_pool,
    refused_between,
    register_successor,
)
from pipeline.registry.versions import describe, get_version, logged_model, version_at
from pipeline.routing.pool import Pool
from pipeline.routing.store import ExpertReference

FETCHES = 8
"""Experts that are fetched at the same time."""


class AddError(UserError):
    """A task that cannot be added to a pool; the message says why, and what can be done."""


@dataclass(frozen=True)
class Added:
    """A pool's version with the new expert."""

    version: ModelVersion
    before: ModelVersion
    """The version that it was made of."""
    expert: ModelVersion
    pool: Pool
    evaluation: Evaluation
    """Accuracies by task and base ability, as far as they could be measured."""
    base: dict[str, float]
    """Those of the frozen base alone."""
    unknown: dict[str, int]
    """Earlier prompts by task that an expert answers now whose answer nobody knows; they count as wrong."""
    unmeasured: list[str]
    """Earlier tasks whose evaluation prompts the registry does not keep."""
    undecided: list[str]
    """Earlier tasks and base abilities of which the router does not say who answers before an answer is made."""


def stream_of(settings: AddConfig, before: Registered, uri: str) -> LearnConfig:
    """Returns the configuration of a stream of the one task: what `settings` leave out, the pool and its newest expert say.

    `uri` is the registry. Raises RegistryError where base or expert cannot be read, ConfigError where they do not fit.
    """
    newest = list(before.references.values())[-1:]
    card = card_of(get_version(newest[0].model, newest[0].version or 0)) if newest and newest[0].model else None
    learned: dict[str, Any] = dict(card.identity) if card is not None else {}
    if card is not None and not learned:  # of an earlier release
        learned = {"seed": card.seed, "expert.rank": card.rank, "expert.alpha": card.alpha}
    client = MlflowClient()
    experiment = client.get_experiment(client.get_run(before.version.run_id).info.experiment_id).name
    limit = {key: before.served[key] for key in ("expert_memory",) if before.served.get(key)}
    of_training = _learned(RouterConfig, "router", learned, OF_TRAINING)
    return LearnConfig(
        name=settings.name or f"{before.name}-{settings.task.name}",
        output=settings.output,
        seed=settings.seed if settings.seed is not None else int(learned.get("seed", 0)),
        base=_base(settings.base, before),
        stream=StreamConfig(tasks=(settings.task,), benchmarks=settings.benchmarks),
        data=DataConfig.model_validate(_learned(DataConfig, "data", learned) | _given(settings.data)),
        expert=ExpertConfig.model_validate(_learned(ExpertConfig, "expert", learned) | _given(settings.expert)),
        router=before.pool.router.model_copy(update=of_training | _given(settings.router)),
        training=settings.training,
        evaluation=settings.evaluation.model_copy(update=limit | _given(settings.evaluation)),
        registry=settings.registry.model_copy(
            update={"experiment": experiment} | _given(settings.registry) | {"uri": uri, "pool": before.name}
        ),
    )


def _given(group: Config) -> dict[str, Any]:
    return {name: getattr(group, name) for name in group.model_fields_set}


def _learned(
    group: type[Config], name: str, identity: Mapping[str, Any], only: set[str] | None = None
) -> dict[str, Any]:
    """Returns the settings of a group that are parts of an expert's identity."""
    parts = {key.partition(".")[2]: value for key, value in identity.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in group.without_aliases(parts).items() if only is None or key in only}


def _base(given: BaseModelConfig, before: Registered) -> BaseModelConfig:
    """Returns the pool's base: where it is said to lie, where it lay when it was registered, or the registry's copy."""
    served = {key: value for key, value in before.served.items() if key in BaseModelConfig.model_fields}
    settings, wanted = served | _given(given) | {"name": before.pool.base_label}, before.pool.base_fingerprint
    if "path" in given.model_fields_set:
        base = BaseModelConfig.model_validate(settings)
        if (found := fingerprint(checkpoint(base))) != wanted:
            raise BaseError(
                f"base.path: {without_secrets(base.path)} has fingerprint {found}, the pool's base {wanted}; name the "
                "checkpoint that the pool was made for, or leave base.path out: the registry has a copy"
            )
        return base
    path = logged_model(base_of(before.version)).params["path"]
    if path == "tiny" or Path(path).is_dir():  # on shared storage all nodes see it
        base = BaseModelConfig.model_validate(settings | {"path": path})
        if fingerprint(checkpoint(base)) == wanted:
            return base
    return BaseModelConfig.model_validate(settings | {"path": str(base_folder(before.served["base_model_id"]))})


def add_task(session: StreamSession, start: ModelVersion, *, replaces: bool = False) -> Added:
    """Learns the session's one task, and adds its expert to the newest version that goes on from `start`.

    Stopped at any moment, the same call goes on. Raises AddError where the pool has another expert of that name and the new
    one does not replace it.
    """
    config, model = session.config, start.name
    (task,), benchmarks = config.stream.tasks, [task.name for task in config.stream.benchmarks]
    check_tasks(session)
    _check_new(session, session.retry(partial(newest_with, start), f"looking for versions of {model}"), replaces)
    trainings = Trainings(session)
    trainings.start_workers()
    base = session.evaluate([task.name, *benchmarks], None, "base", who="the base").accuracies()
    trained = trainings.expert(task)
    expert = registered_expert(session, task, trained)
    version, before = session.retry(
        partial(join_pool, session, start, expert, replaces=replaces),
        f"registering {model}",
        kept="the expert is registered; nothing will be trained again",
    )
    session.progress.log(f"  {model} version {version.version}: version {before.version.version} with {task.name}")
    left_out = session.retry(partial(refused_between, before.version, version), f"looking for versions of {model}")
    for refused, status in left_out.items():
        session.progress.log(f"  without version {refused}, which is not built upon: {status}")
    made = session.retry(partial(open_pool, version, session.experts), f"reading {model}")
    return _evaluated(session, made, before.version, expert, base)


def _check_new(session: StreamSession, version: ModelVersion, replaces: bool) -> None:
    """Raises AddError, before anything is trained, where a pool has another expert of the task's name."""
    (task,) = session.config.stream.tasks
    before = session.retry(partial(open_pool, version, session.experts), f"reading {version.name}")
    if (reference := before.references.get(task.name)) is not None and not replaces:
        _check_same(session, before.version, reference)


def _check_same(session: StreamSession, version: ModelVersion, reference: ExpertReference) -> None:
    """Raises AddError where a pool's expert is another than the one that this run makes."""
    (task,) = session.config.stream.tasks
    if reference.digest == session.identity.expert(task):
        return
    assert reference.model is not None
    other = card_of(get_version(reference.model, reference.version or 0))
    changes = "; ".join(differences(other.identity, session.identity.parts(task)))
    raise AddError(
        f"task {task.name!r}: {version.name} version {version.version} has an expert of that name already, {reference.model} "
        f"version {reference.version}, learned otherwise ({changes}); give the task another name, or let the new expert take "
        "its place: --replace"
    )


def join_pool(
    session: StreamSession, start: ModelVersion, expert: RegisteredExpert, *, replaces: bool
) -> tuple[ModelVersion, Registered]:
    """Makes the pool's next version with the expert; returns it, and the version that it was made of."""
    reference = expert.expert.reference
    with deciding(start.name):
        before = open_pool(newest_with(start), session.experts)
        there = before.references.get(reference.name)
        if there is not None and there.digest == reference.digest and reference.name not in before.pool.retired:
            version, before = before.version, open_pool(start, session.experts)  # made by an earlier call
        else:
            if there is not None and not replaces:
                _check_same(session, before.version, there)
            pool, change = before.pool.add(expert.expert), ["added", reference.name, str(reference.digest)]
            version = register_successor(before, pool, change, experts=[expert.version])
        theirs = unseen_changes(version, start).get(reference.name)
        if theirs is not None and not replaces:
            describe(version, tags={"status": f"{REFUSED}: {reference.name} came from {theirs.address} meanwhile"})
            _check_same(session, version, reference_to(reference.name, version_at(theirs.address)))
        return merged(version, start, session.experts, own=reference.name), before


def _evaluated(
    session: StreamSession,
    made: Registered,
    before: ModelVersion,
    expert: RegisteredExpert,
    base: Mapping[str, float],
) -> Added:
    """Evaluates a version on the new task's prompts and on the earlier ones that the registry keeps; tells the registry."""
    (task,), benchmarks = session.config.stream.tasks, [task.name for task in session.config.stream.benchmarks]
    pool, version = made.pool, made.version
    pool.save(session.folder / "pool")
    fetching = session.progress.working(f"fetching what is missing of {len(pool.names)} experts")
    with fetching, ThreadPoolExecutor(FETCHES) as threads:
        list(threads.map(pool.experts.__getitem__, pool.names))
    now = session.evaluate([task.name, *benchmarks], pool, made.digest, folder=session.folder / "pool")
    with session.progress.working("evaluating earlier tasks on the prompts that the registry keeps"):
        kept = session.retry(partial(made.evaluated_on, before), "reading evaluation prompts")
        earlier = evaluate_recorded(pool, {n: e.prompts for n, e in kept.items() if n not in now.results})
    evaluation = Evaluation({**earlier.evaluation.results, **now.results})
    accuracies = {**earlier.base, **base}
    digests = {name: evaluated.score.digest for name, evaluated in kept.items()} | session.scored_rows
    session.log_metrics(
        [(f"accuracy/{name}", value, len(pool.names)) for name, value in evaluation.accuracies().items()]
    )
    catalog = Catalog(session, accuracies, digests)
    catalog.show(version, pool, evaluation, expert.version)
    catalog.close(version, pool, evaluation, {task.name: expert.version}, {task.name: expert.metrics})
    known = {*evaluation.results, *earlier.undecided, *pool.retired}
    return Added(
        get_version(version.name, str(version.version)),
        before,
        expert.version,
        pool,
        evaluation,
        accuracies,
        earlier.unknown,
        [name for name in pool.names if name not in known],
        earlier.undecided,
    )
