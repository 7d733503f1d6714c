"""What a sweep does: trainings, one a rank, and trials, which take a rank's expert and evaluate it at some temperature.

A trial holds only a token of a CPU, since Ray Train books CPUs of its own: a trial that held one while the workers it waits
for wait for it would never end (ray issue 54305).
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
from ray import tune

from pipeline.config import BaseModelConfig, EvaluationConfig, RouterConfig, TaskConfig
from pipeline.evaluation.evaluate import Answerer, Evaluation, score
from pipeline.routing.expert import Expert
from pipeline.routing.pool import Pool
from pipeline.training.run import run_training
from pipeline.training.worker import Job

TOKEN = {"cpu": 0.01}
"""What a trial books for itself."""


@ray.remote(num_cpus=0)
class Trainings:
    """Trains an expert at every rank, `at_once` of them together, in the order of `ranks`; begins by itself.

    Whoever waits for a training takes one of the actor's threads (`max_concurrency`).
    """

    def __init__(
        self, job: Job, rows: ray.data.Dataset, ranks: Sequence[int], *, at_once: int, storage: str, env: dict[str, str]
    ) -> None:
        self._job, self._rows, self._storage, self._env = job, rows, Path(storage), env
        pool = ThreadPoolExecutor(at_once)
        self._running = {rank: pool.submit(self._train, rank) for rank in ranks}

    def finished(self, rank: int) -> dict[str, Any]:
        """Waits for a rank's training; returns `expert` (its folder), `seconds`, `expert_loss` and `losses`."""
        return self._running[rank].result()

    def _train(self, rank: int) -> dict[str, Any]:
        started = time.monotonic()
        expert = self._job.expert.model_copy(update={"rank": rank, "alpha": None})
        trained = run_training(
            self._job.model_copy(update={"expert": expert, "digest": f"{self._job.digest}-rank{rank}"}),
            self._rows,
            storage=self._storage,
            worker_env=self._env,
        )
        return {
            "expert": str(trained.expert),
            "seconds": time.monotonic() - started,
            "expert_loss": trained.figures["expert_loss"],
            "losses": trained.figures["expert_losses"],
        }


class EvaluateTemperature(tune.Trainable):
    """Evaluates the expert of rank `config["rank"]` inside the pool, routed at `config["temperature"]`.

    One process evaluates several trials, so that each costs its answers and nothing else.
    """

    def setup(
        self,
        config: dict[str, Any],
        *,
        trainings: Any,
        base: BaseModelConfig,
        pool: str | None,
        prompts: ray.data.Dataset,
        tasks: Mapping[str, TaskConfig],
        evaluation: EvaluationConfig,
        threads: int,
    ) -> None:
        """Loads base, pool and the encoded prompts of all tasks in it; called once a process, while experts train."""
        self._trainings, self._tasks = trainings, tasks
        self._answerer = Answerer(base, None, "routed", evaluation, threads)
        self._pool = Pool.load(pool) if pool else None
        self._batches = list(prompts.iter_batches(batch_size=evaluation.batch_size, batch_format="numpy"))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Agrees to the next trial."""
        return True

    def step(self) -> dict[str, Any]:
        """Returns `accuracy` on the expert's own task, `others`, the mean over the pool's other tasks, and `seconds`.

        Waits for the expert first.
        """
        training = ray.get(self._trainings.finished.remote(self.config["rank"]))
        started = time.monotonic()
        trained, base = Expert.load(training["expert"]), self._answerer.base
        pool = self._pool or Pool(base.label, base.fingerprint, RouterConfig())
        self._answerer.attach(
            pool.add(trained).routed_by(kind="token", token_scores="published", temperature=self.config["temperature"])
        )
        answered = [score(self._answerer(batch), self._tasks) for batch in self._batches]
        means = Evaluation([p for predictions in answered for p in predictions]).accuracies()
        own = means.pop(trained.card.task)
        others = fmean(means.values()) if means else float("nan")
        return {"accuracy": own, "others": others, "seconds": time.monotonic() - started, "done": True}
