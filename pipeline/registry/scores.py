"""Scores of pools and experts in the registry: accuracies on data sets, as metrics of the logged model behind a version.

A model's page and `search_logged_models(order_by=...)` show them by data set. Of a task the metric is `accuracy`, of a base
ability `base_ability`; `base_accuracy` is what the frozen base alone has on either. Their means have no data set, and come
last: MLflow's pages compare runs by the last value of each metric.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from time import time

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from pipeline.registry.versions import logged_model, logged_model_id

ACCURACY, ABILITY, BASE_ACCURACY = "accuracy", "base_ability", "base_accuracy"


@dataclass(frozen=True)
class Score:
    """Accuracy on the evaluation prompts of a task or of a base ability."""

    dataset: str
    """Its name."""
    digest: str
    """Digest of prompts and metric, at most 36 characters: scores of equal digests can be compared."""
    accuracy: float
    """From 0 to 1."""
    base_accuracy: float | None
    """That of the frozen base alone."""
    ability: bool = False
    """Whether it is a base ability, not a task."""


def log_scores(run_id: str, version: ModelVersion, scores: Sequence[Score]) -> None:
    """Logs scores on the logged model behind a version; those that are there already are not logged again."""
    present, now = set(scores_of(version)), int(time() * 1000)
    model_id, metrics = logged_model_id(version), []
    for step, score in enumerate(scores):
        if score in present:
            continue
        # MLflow tells metrics of one name and time apart by their step, not by their data set.
        values = {(ABILITY if score.ability else ACCURACY): score.accuracy, BASE_ACCURACY: score.base_accuracy}
        metrics += [
            Metric(
                key,
                value,
                now,
                step,
                model_id=model_id,
                dataset_name=score.dataset,
                dataset_digest=score.digest,
            )
            for key, value in values.items()
            if value is not None
        ]
    if metrics and len(scores) > 1:
        means = {
            ACCURACY: mean_accuracy(scores),
            ABILITY: _mean([score.accuracy for score in scores if score.ability]),
            BASE_ACCURACY: _mean([s.base_accuracy for s in scores if s.base_accuracy is not None and not s.ability]),
        }
        metrics += [
            Metric(key, value, now, len(scores), model_id=model_id) for key, value in means.items() if value is not None
        ]
    for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
        MlflowClient().log_batch(run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])


def scores_of(version: ModelVersion) -> list[Score]:
    """Returns the newest scores of a version by data set, in the order in which they were logged; none where it has none."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for metric in sorted(logged_model(version).metrics or (), key=lambda m: (m.timestamp, m.step)):
        if metric.dataset_name and metric.key in (ACCURACY, ABILITY, BASE_ACCURACY):
            found.setdefault((metric.dataset_name, metric.dataset_digest), {})[metric.key] = metric.value
    newest = {}
    for (dataset, digest), values in found.items():
        accuracy = values.get(ACCURACY, values.get(ABILITY))
        if accuracy is not None:
            newest[dataset] = Score(dataset, digest, accuracy, values.get(BASE_ACCURACY), ABILITY in values)
    return list(newest.values())


def mean_accuracy(scores: Iterable[Score]) -> float | None:
    """Returns the mean accuracy over tasks; None without any."""
    return _mean([score.accuracy for score in scores if not score.ability])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def base_kept(scores: Iterable[Score]) -> float | None:
    """Returns the share of the base's accuracy that is kept on the base abilities, a ratio of sums; None without any."""
    both = [(s.accuracy, s.base_accuracy) for s in scores if s.ability and s.base_accuracy is not None]
    total = sum(base for _, base in both)
    return sum(now for now, _ in both) / total if total > 0 else None


def tags_of(scores: Sequence[Score]) -> dict[str, str]:
    """Returns the tags of a pool's version that say how good it is."""
    accuracy, kept = mean_accuracy(scores), base_kept(scores)
    return {
        **({"accuracy": f"{accuracy:.3f}"} if accuracy is not None else {}),
        **({"base_kept": f"{kept:.2f}"} if kept is not None else {}),
    }
