"""What a run tells the registry about its versions once they are evaluated: scores, tags, descriptions, the champion."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from pipeline.config import TaskConfig, without_secrets
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.results import Evaluation
from pipeline.learning.session import StreamSession
from pipeline.provenance import command_line, git_commit
from pipeline.registry.descriptions import DESCRIBED, Answered, Measured, Origin, expert_description, pool_description
from pipeline.registry.evaluated_prompts import has_prompts, keep_prompts
from pipeline.registry.names import read_name
from pipeline.registry.promotion import decide
from pipeline.registry.scores import Score, log_scores, tags_of
from pipeline.registry.strays import RoutedPrompt, Strays, keep_strays, strays_of
from pipeline.registry.successors import base_of
from pipeline.registry.versions import EVALUATED, REGISTERED, describe
from pipeline.routing.pool import Pool

SAMPLES = 1
"""Sample prompts per task and base ability in a pool's description."""

SAMPLES_OF_EXPERT = 5
"""Sample prompts in an expert's description."""

KEPT = "what was learned is safe; the same command tells the registry again"


class Catalog:
    """Tells the registry of one run's versions.

    `base` are the base's accuracies by task and base ability, `digests` name their evaluation prompts.
    """

    def __init__(self, session: StreamSession, base: Mapping[str, float], digests: Mapping[str, str]) -> None:
        self._session, self._base, self._digests = session, base, digests
        self._abilities = [task.name for task in session.config.stream.benchmarks]
        """Base abilities whose prompts are to be looked after."""
        self._run = f"#/experiments/{session.experiment}/runs/{session.mlflow_run_id}"
        self._origin = Origin(command_line(), git_commit(), self._run)

    def show(self, version: ModelVersion, pool: Pool, evaluation: Evaluation, expert: ModelVersion) -> None:
        """Tells the scores of a pool's version, and of the `expert` that it brings."""
        scores, run_id = self._scores(pool, evaluation), self._session.mlflow_run_id
        named = read_name(expert.name)
        own = [score for score in scores if named is not None and score.dataset == named.name]

        def tell() -> None:
            log_scores(run_id, version, scores)
            if strays_of(version) is None:
                keep_strays(version, strays_from(pool, evaluation, scores))
            self._keep_prompts(version, pool, own, expert)
            undecided = version.tags.get("status") == REGISTERED
            describe(version, tags=tags_of(scores) | ({"status": EVALUATED} if undecided else {}))
            if own and "accuracy" not in expert.tags:  # what it had in the first pool that it joined stays
                log_scores(run_id, expert, own)
                describe(expert, tags={"accuracy": f"{own[0].accuracy:.3f}", "status": EVALUATED})

        self._session.retry(tell, f"telling the scores of {version.name} {version.version}", kept=KEPT)

    def _keep_prompts(self, version: ModelVersion, pool: Pool, own: Sequence[Score], expert: ModelVersion) -> None:
        """Keeps the evaluation prompts of a task beside its expert, those of the base abilities beside the base."""
        base = base_of(version) if self._abilities else None
        for name, holder in [*((s.dataset, expert) for s in own), *((name, base) for name in self._abilities)]:
            if holder is not None and not has_prompts(holder, self._digests[name]):
                keep_prompts(holder, self._digests[name], self._session.evaluated_prompts(name, pool))
        self._abilities = []  # of all versions of this run

    def close(
        self,
        version: ModelVersion,
        pool: Pool,
        evaluation: Evaluation,
        experts: Mapping[str, ModelVersion],
        metrics: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Describes the last pool and its experts with samples, and lets the gate decide whether it becomes champion.

        `metrics` are those of the experts' trainings.
        """

        def tell() -> None:
            scores = self._scores(pool, evaluation)
            for task in self._session.config.stream.tasks:
                self._describe_expert(
                    task, experts[task.name], pool, evaluation, scores, metrics[task.name].get("rows")
                )
            self._describe_pool(version, pool, evaluation, scores)

        self._session.retry(tell, f"describing {version.name} {version.version}", kept=KEPT)

    def _describe_expert(
        self,
        task: TaskConfig,
        version: ModelVersion,
        pool: Pool,
        evaluation: Evaluation,
        scores: Sequence[Score],
        rows: int | None,
    ) -> None:
        if DESCRIBED in (version.description or ""):
            return  # by the run that learned it
        description = expert_description(
            self._session.config.base.label,
            pool.experts[task.name].card,
            rows=rows,
            score=next((score for score in scores if score.dataset == task.name), None),
            samples=_samples(evaluation, [task.name], SAMPLES_OF_EXPERT),
            origin=replace(self._origin, data=without_secrets(task.train.path) if task.train else ""),
        )
        describe(version, tags={}, description=description)

    def _describe_pool(
        self,
        version: ModelVersion,
        pool: Pool,
        evaluation: Evaluation,
        scores: Sequence[Score],
    ) -> None:
        verdict, samples = self._decide(version, scores), _samples(evaluation, list(evaluation.results), SAMPLES)
        if DESCRIBED in (version.description or ""):
            return  # by the run that made it
        numbers = {r.name: r.version or 0 for r in pool.card.experts if r.name not in pool.retired}
        describe(
            version,
            tags={},
            description=pool_description(
                self._session.config.base.label,
                self._session.config.pool,
                numbers,
                pool.router.kind,
                retired=pool.retired,
                measured=Measured(scores, own_shares(pool, evaluation), samples),
                verdict=verdict,
                origin=self._origin,
            ),
        )

    def _decide(self, version: ModelVersion, scores: Sequence[Score]) -> str:
        """Lets the gate decide about a version; returns what was decided."""
        settings = self._session.config.registry
        verdict = decide(version, scores, gate=settings.promote == "gate", tolerance=settings.tolerance)
        if verdict.reason is not None:
            self._session.progress.log(
                f"  {version.name} {version.version} does not become champion: {verdict.reason}; "
                f"`pointsman registry promote {version.name} {version.version}` makes it so"
            )
        return verdict.text

    def _scores(self, pool: Pool, evaluation: Evaluation) -> list[Score]:
        return scores_from(pool, evaluation, self._base, self._digests)


def scores_from(
    pool: Pool, evaluation: Evaluation, base: Mapping[str, float], digests: Mapping[str, str]
) -> list[Score]:
    """Returns the scores of a pool; `base` are the base's accuracies, `digests` name the evaluation prompts."""
    return [
        Score(name, digests[name], accuracy, base.get(name), name not in pool.names)
        for name, accuracy in evaluation.accuracies().items()
    ]


def own_shares(pool: Pool, evaluation: Evaluation) -> dict[str, float]:
    """Returns the share of each data set's prompts that its own expert, or the base, answered."""
    return {
        name: result.experts.get(name if name in pool.names else BASE, 0) / max(1, sum(result.experts.values()))
        for name, result in evaluation.results.items()
    }


def strays_from(pool: Pool, evaluation: Evaluation, scores: Sequence[Score]) -> dict[str, Strays]:
    """Returns the strays of a pool's evaluation."""
    return {
        score.dataset: Strays(
            score.digest,
            BASE if score.ability or score.dataset in pool.retired else score.dataset,
            [RoutedPrompt(s.id, s.question, s.expert) for s in evaluation.results[score.dataset].strays],
        )
        for score in scores
    }


def _samples(evaluation: Evaluation, names: Sequence[str], count: int) -> list[Answered]:
    return [
        Answered(name, p.question, p.prediction, p.expert, p.score == 1.0)
        for name in names
        if name in evaluation.results
        for p in evaluation.results[name].samples[:count]
    ]
