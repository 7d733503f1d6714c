"""Puts another version of an expert into a registered pool, and measures it without any data."""

from dataclasses import asdict, dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.config import RegistryConfig
from pipeline.evaluation.recorded import evaluate_recorded
from pipeline.learning.catalog import own_shares, scores_from, strays_from
from pipeline.provenance import command_line, git_commit
from pipeline.registry.descriptions import Measured, Origin, pool_description
from pipeline.registry.experts import registered_experts
from pipeline.registry.merging import merged
from pipeline.registry.names import read_name
from pipeline.registry.promotion import champion, decide, deciding, promote
from pipeline.registry.scores import log_scores, tags_of
from pipeline.registry.strays import keep_strays, strays_of
from pipeline.registry.successors import open_pool, register_successor, replacement
from pipeline.registry.tracking import run_beside
from pipeline.registry.versions import EVALUATED, REGISTERED, describe, number


@dataclass(frozen=True)
class Replaced:
    """A pool's version with another version of an expert."""

    model: str
    version: int
    before: int
    """The version that it was made of."""
    verdict: str
    """What was decided about it."""
    unknown: dict[str, int]
    """Prompts by task that an expert answers now whose answer nobody knows; they count as wrong."""
    unmeasured: list[str]
    """Tasks whose evaluation prompts the registry does not keep."""
    undecided: list[str]
    """Tasks and base abilities of which the router does not say who answers before an answer is made."""

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form."""
        return asdict(self)


def replace_expert(before: ModelVersion, expert: ModelVersion, *, force: bool = False) -> Replaced:
    """Makes a version of the pool in which `expert` takes the place of the pool's expert of its task.

    It becomes champion if the gate lets it pass, or by `force`. Raises RegistryError and PoolError as `replacement` does.
    """
    opened, address = open_pool(before), f"{expert.name}/{expert.version}"
    changed, named = replacement(opened, expert), read_name(expert.name)
    assert named is not None, "else there is no replacement"
    with run_beside(before, f"replace by {address}") as run_id:
        with deciding(before.name):
            made = register_successor(opened, changed, ["replaced", address], experts=[expert])
            made = merged(made, before, registered_experts(), own=named.name)
        now = open_pool(made)
        pool = now.pool
        kept = now.evaluated_on(before)
        recorded = evaluate_recorded(pool, {name: evaluated.prompts for name, evaluated in kept.items()})
        digests = {name: evaluated.score.digest for name, evaluated in kept.items()}
        scores = scores_from(pool, recorded.evaluation, recorded.base, digests)
        log_scores(run_id, made, scores)
        if strays_of(made) is None:
            keep_strays(made, strays_from(pool, recorded.evaluation, scores))
        status = {"status": EVALUATED} if made.tags.get("status") == REGISTERED else {}
        describe(made, tags=tags_of(scores) | status)
        settings = RegistryConfig()
        verdict = decide(made, scores, gate=settings.promote == "gate", tolerance=settings.tolerance).text
        in_use = champion(made.name)
        if force and (in_use is None or number(in_use) != number(made)):
            with deciding(made.name):
                promote(made.name, str(made.version))
            verdict = "promoted by hand"
        numbers = {name: reference.version or 0 for name, reference in now.in_use.items()}
        experiment = MlflowClient().get_run(run_id).info.experiment_id
        description = pool_description(
            pool.base_label,
            now.name,
            numbers,
            pool.router.kind,
            retired=pool.retired,
            measured=Measured(scores, own_shares(pool, recorded.evaluation)),
            verdict=verdict,
            origin=Origin(command_line(), git_commit(), f"#/experiments/{experiment}/runs/{run_id}"),
        )
        describe(made, tags={}, description=description)
    known = {*recorded.evaluation.results, *recorded.undecided, *pool.retired}
    unmeasured = [name for name in pool.names if name not in known]
    return Replaced(made.name, number(made), number(before), verdict, recorded.unknown, unmeasured, recorded.undecided)
