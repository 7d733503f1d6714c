"""What `scale` and `resemblance` share: short trainings of the confusable tasks, so that experts are found by either."""

from collections.abc import Mapping, Sequence

from pipeline.evaluation.results import Evaluation

STEPS = 60
"""Optimizer steps per task: a dictionary of six words is learned in so many."""
PROMPTS = 100
"""Prompts per ability, and at most per task."""
OWN = (
    f"expert.steps={STEPS}",
    "expert.rank=8",
    "expert.batch_size=16",
    "expert.learning_rate=4e-3",
    "router.steps=5",
    f"evaluation.limit={PROMPTS}",
    "data.num_readers=1",
)
"""Overrides of the demo's configuration."""


def mean(accuracies: Mapping[str, float], names: Sequence[str]) -> float:
    """Returns the mean accuracy on these tasks or abilities."""
    return sum(accuracies[name] for name in names) / len(names)


def routing_accuracy(evaluation: Evaluation, tasks: Sequence[str], of: Sequence[str]) -> float:
    """Returns the share of the prompts `of` some tasks and abilities that were routed right, where `tasks` have experts."""
    return Evaluation({name: evaluation.results[name] for name in of}).routing_accuracy(tasks)
