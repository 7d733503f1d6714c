"""What trials do: one trains an expert of some rank, another evaluates it at some temperature.

A training trial holds only a token of a CPU, since Ray Train books CPUs of its own: a trial that held one while its
workers wait for it would never end (ray issue 54305).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import ray
from ray import tune

from pipeline.config import BaseModelConfig, RouterConfig, TaskConfig
from pipeline.data.encoded.packing import unpack
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.evaluation.answers import AnswerStore, pool_author
from pipeline.evaluation.pages import paged
from pipeline.evaluation.predictor import Predictor
from pipeline.evaluation.results import Evaluation, Prediction, scored
from pipeline.models.inference import InferenceWorkers
from pipeline.routing.expert import Expert
from pipeline.routing.pool import Pool
from pipeline.training.session import Session
from pipeline.training.spec import TrainSpec

TOKEN = {"cpu": 0.01}
"""What a trial that trains books for itself."""


class TrainRank(tune.Trainable):
    """Trains the task's expert at rank `config["rank"]`, or goes on with the run of that name; reports its folder.

    One process trains several ranks, on workers that start once.
    """

    def setup(
        self, config: dict[str, Any], *, spec: dict[str, Any], rows: TrainingRows, storage: str, env: dict[str, str]
    ) -> None:
        """Takes what all ranks have in common; called once a process."""
        self._spec, self._rows = TrainSpec.model_validate(spec), rows
        self._session = Session(self._spec.training, storage=Path(storage), worker_env=env)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Agrees to the next trial."""
        return True

    def step(self) -> dict[str, Any]:
        """Returns `expert`, a folder, `seconds`, `expert_loss` and `losses`."""
        started, rank = time.monotonic(), self.config["rank"]
        changes = {
            "expert": self._spec.expert.model_copy(update={"rank": rank, "alpha": None}),
            "digest": f"{self._spec.digest}-rank{rank}",
        }
        trained = self._session.train(self._spec.model_copy(update=changes), self._rows)
        metrics = trained.metrics
        spent = (
            metrics["expert_seconds"] + metrics["router_seconds"]
            if trained.already_finished
            else time.monotonic() - started
        )
        return {
            "expert": str(trained.expert),
            "seconds": spent,
            "expert_loss": metrics["expert_loss"],
            "losses": metrics["expert_losses"],
            "done": True,
        }

    def cleanup(self) -> None:
        """Sends the workers home."""
        self._session.close()


class EvaluateTemperature(tune.Trainable):
    """Evaluates the expert of rank `config["rank"]` inside the pool, routed at `config["temperature"]`.

    One process evaluates several trials, so that each costs its answers and nothing else; what a pool has answered before,
    in an earlier sweep, is looked up.
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
        answers: str,
        pool_key: Callable[[Sequence[str], RouterConfig], str],
    ) -> None:
        """Loads base, pool and the encoded prompts of all tasks in it; called once a process.

        `answers` is the folder of the store of answers, `pool_key` names a pool by its experts' digests and its router.
        """
        self._experts, self._tasks, self._tokens = experts, tasks, max_new_tokens
        self._store, self._pool_key = AnswerStore(Path(answers)), pool_key
        self._predictor = Predictor(base, workers)
        self._pool = Pool.load(pool) if pool else None
        blocks = list(prompts.iter_batches(batch_size=None, batch_format="numpy"))
        rows = {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
        self._pages = [
            {key: values[list(page)] for key, values in rows.items()}
            for column in dict.fromkeys(rows["column"].tolist())
            for page in paged(np.flatnonzero(rows["column"] == column).tolist(), workers.batch_size)
        ]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Agrees to the next trial."""
        return True

    def step(self) -> dict[str, Any]:
        """Returns `accuracy` on the expert's own task, `others`, the mean over the pool's other tasks, and `seconds`."""
        started = time.monotonic()
        trained, base = Expert.load(self._experts[self.config["rank"]]), self._predictor.base
        pool = (self._pool or Pool(base.label, base.fingerprint, RouterConfig())).add(trained)
        pool = pool.routed_by(kind="token", token_scores="phatgoose", temperature=self.config["temperature"])
        means = Evaluation.of(self._predictions(pool)).accuracies()
        accuracy = means.pop(trained.card.task)
        others = fmean(means.values()) if means else float("nan")
        return {"accuracy": accuracy, "others": others, "seconds": time.monotonic() - started, "done": True}

    def _predictions(self, pool: Pool) -> Iterator[Prediction]:
        """Yields the predictions of a pool whose Linears choose; what it has not answered before is generated."""
        author = pool_author(self._pool_key(pool.digests, pool.router))
        attached = False
        for page in self._pages:
            known_answers = self._store.of(author, page["prompt"])
            missing = [i for i, prompt in enumerate(page["prompt"]) if prompt not in known_answers]
            if missing and not attached:
                self._predictor.attach(pool)
                attached = True
            if missing:
                rows = unpack({key: values[missing] for key, values in page.items()})
                answers = self._predictor.by_router(rows, self._tokens)
                self._store.add(author, dict(zip(page["prompt"][missing], answers, strict=True)))
            for column, id, question, reference, prompt in zip(
                *(page[key] for key in ("column", "id", "question", "reference", "prompt")), strict=True
            ):
                answer, metric = self._store.of(author, [])[prompt], self._tasks[column].metric
                yield scored(column, metric, id, question, reference, answer.text, answer.expert)
        self._store.flush()
