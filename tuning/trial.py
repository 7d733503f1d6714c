"""What trials do: one trains an expert of some rank, another evaluates it at some temperature.

A training trial holds only a token of a CPU, since Ray Train books CPUs of its own: a trial that held one while its
workers wait for it would never end (ray issue 54305).
"""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
from ray import tune

from pipeline.config import BaseModelConfig, RouterConfig, TaskConfig
from pipeline.evaluation.evaluate import Evaluation, Predictor, score
from pipeline.models.inference import InferenceWorkers
from pipeline.routing.expert import Expert
from pipeline.routing.pool import Pool
from pipeline.streams.training_rows import TrainingRows
from pipeline.training.job import Job
from pipeline.training.session import run_training

TOKEN = {"cpu": 0.01}
"""What a trial that trains books for itself."""


def train_rank(
    space: dict[str, Any], *, job: dict[str, Any], rows: TrainingRows, storage: str, env: dict[str, str]
) -> None:
    """Trains the task's expert at rank `space["rank"]`, or goes on with the run of that name; reports its folder."""
    started = time.monotonic()
    base = Job.model_validate(job)
    rank = space["rank"]
    expert = base.expert.model_copy(update={"rank": rank, "alpha": None})
    trained = run_training(
        base.model_copy(update={"expert": expert, "digest": f"{base.digest}-rank{rank}"}),
        rows,
        storage=Path(storage),
        worker_env=env,
    )
    tune.report(
        {
            "expert": str(trained.expert),
            "seconds": time.monotonic() - started,
            "expert_loss": trained.figures["expert_loss"],
            "losses": trained.figures["expert_losses"],
        }
    )


class EvaluateTemperature(tune.Trainable):
    """Evaluates the expert of rank `config["rank"]` inside the pool, routed at `config["temperature"]`.

    One process evaluates several trials, so that each costs its answers and nothing else.
    """

    def setup(
        self,
        config: dict[str, Any],
        *,
        experts: Mapping[int, str],
        base: BaseModelConfig,
        pool: str | None,
        prompts: ray.data.Dataset,
        tasks: Mapping[str, TaskConfig],
        max_new_tokens: int,
        workers: InferenceWorkers,
    ) -> None:
        """Loads base, pool and the encoded prompts of all tasks in it; called once a process."""
        self._experts, self._tasks = experts, tasks
        self._predictor = Predictor(base, workers, None, "routed", max_new_tokens)
        self._pool = Pool.load(pool) if pool else None
        self._batches = list(prompts.iter_batches(batch_size=workers.batch_size, batch_format="numpy"))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Agrees to the next trial."""
        return True

    def step(self) -> dict[str, Any]:
        """Returns `accuracy` on the expert's own task, `others`, the mean over the pool's other tasks, and `seconds`."""
        started = time.monotonic()
        trained, base = Expert.load(self._experts[self.config["rank"]]), self._predictor.base
        pool = self._pool or Pool(base.label, base.fingerprint, RouterConfig())
        self._predictor.attach(
            pool.add(trained).routed_by(kind="token", token_scores="published", temperature=self.config["temperature"])
        )
        answered = [score(self._predictor(batch), self._tasks) for batch in self._batches]
        means = Evaluation([p for predictions in answered for p in predictions]).accuracies()
        own = means.pop(trained.card.task)
        others = fmean(means.values()) if means else float("nan")
        return {"accuracy": own, "others": others, "seconds": time.monotonic() - started, "done": True}
