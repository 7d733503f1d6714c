"""The console command `pointsman`: every job is a subcommand; `--address` submits the same job to a cluster."""

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from jobs.lazy import Lazy, lazy_group
from jobs.submit_options import ComputingCommand, SubmittableCommand


class TeachingCommand(TyperCommand):
    """A command whose help ends with every field of its configuration."""

    config_class = "LearnConfig"
    intro: Sequence[str] = (
        "Fields of CONFIG. FIELD=VALUE overrides them, in lists ([]) by number or name: stream.tasks[0].validation=0.1,",
        "stream.tasks.digits.train.limit=100. `extends: other.yaml` takes the others from there. A source (train, eval,",
        "base_prompts) can be a plain path. Benchmarks are tasks without `train`.",
        "",
    )

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the fields as they stand, one to a paragraph."""
        from jobs.options import fields_help  # with all that jobs need: not before a job is looked at

        formatter.write("\n" + fields_help(self.config_class, self.intro) + "\n")


class TeachingLearn(SubmittableCommand, TeachingCommand):
    """A command that learns or measures a stream, here or on a cluster."""


class TeachingAdd(TeachingLearn):
    """The command that adds a task."""

    config_class = "AddConfig"


class TeachingExperiment(ComputingCommand):
    """The command whose help ends with what each experiment asks."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the experiments as they stand."""
        from jobs.experiments.catalogue import described

        formatter.write("\n" + "\n".join(described()) + "\n")


class TeachingPredict(TeachingLearn):
    """The command that answers rows in bulk."""

    config_class = "PredictConfig"
    intro = ("Settings for FIELD=VALUE.", "")


JOBS = {
    "learn": Lazy("jobs.learn:main", "Learn a stream of tasks one after the other.", TeachingLearn),
    "compare": Lazy("jobs.compare:main", "Compare the learned pool with the alternatives.", TeachingLearn),
    "add": Lazy("jobs.add:main", "Add one task to a registered pool.", TeachingAdd),
    "sweep": Lazy("jobs.sweep:main", "Sweep settings of a task's expert and of the router.", TeachingLearn),
    "experiment": Lazy(
        "jobs.experiment:main", "Do experiments: what the method does, and where it ends.", TeachingExperiment
    ),
    "doctor": Lazy("jobs.doctor:main", "Check what a job needs before it starts.", TeachingLearn),
    "plan": Lazy("jobs.plan:main", "Plan a stream before any GPU is rented.", TeachingCommand),
    "recompute-statistics": Lazy(
        "jobs.recompute_statistics:main", "Recompute a pool's statistics, without training.", TeachingLearn
    ),
    "predict": Lazy("jobs.predict:main", "Answer rows in bulk: files in, files out.", TeachingPredict),
    "explain": Lazy("jobs.explain:main", "Explain an answer: candidates, distances, weights.", ComputingCommand),
    "status": Lazy("jobs.status:main", "Show streams, sweeps and jobs, running and past."),
    "jobs": Lazy("jobs.submissions.app:app", "List, follow and stop submitted jobs."),
    "cluster": Lazy("jobs.cluster.app:app", "Start a cluster of several nodes here."),
    "registry": Lazy("jobs.registry.app:app", "Browse the registry, decide which pool is in use."),
    "ui": Lazy("jobs.ui:main", "Browse experts, pools and runs in MLflow."),
    "convert-internvl2": Lazy(
        "jobs.convert_internvl2:main", "Convert an InternVL2 checkpoint for transformers.", ComputingCommand
    ),
    "pretrain-tiny": Lazy("jobs.pretrain_tiny:main", "Pretrain the demo's base.", ComputingCommand),
    "benchmark": Lazy("jobs.benchmark.app:app", "Measure routing, training, data, memory, cost per task."),
}

app = lazy_group(
    JOBS,
    "Continual learning for vision-language models: one expert per task, a router between them, nothing forgotten.",
    versioned=True,
)

if __name__ == "__main__":
    app()
