"""Evaluates pools: missing answers are generated, all others are looked up.

1. A task's prompts are read, encoded and passed through the base once (`prompts`). Their features determine who answers
   each of them, for any pool, without a base (`choices`).
2. An expert's answer to a prompt does not depend on the pool around it. It is generated once (`answers`), in a batch that
   does not depend on the request or on stored answers (`pages`): evaluating a pool after each new expert gives the same
   result as evaluating it from scratch.
3. Where the Linears choose (`token`, and prompts that `two_level` leaves open), an answer depends on the whole pool.

So after task n only the answers of its expert are generated, and those to prompts whose expert has changed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.errors import StreamError
from pipeline.data.loading.prompts import PromptSource
from pipeline.data.rows.quarantine import SetAside
from pipeline.evaluation.actors import PredictorActors
from pipeline.evaluation.answers import AnswerStore, Pull
from pipeline.evaluation.authors import Authors, PageRequest
from pipeline.evaluation.choices import Mode, calibrations, choices, ranking, reasons, routers_of
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.pages import Slices, blocks, slices
from pipeline.evaluation.predictor import PagePredictor
from pipeline.evaluation.prompts import EvalTask, PromptTable
from pipeline.evaluation.reading import PromptTables, compute_image_embeds, name_of
from pipeline.evaluation.results import Evaluation, TaskResult, scored
from pipeline.registry.evaluated_prompts import EvaluatedPrompts
from pipeline.routing.call import Routers
from pipeline.routing.pool import Pool
from pipeline.routing.routes import MIXED
from pipeline.storage.mirror import Folder

SAMPLES = 4
"""Predictions per task that an evaluation keeps."""


class Evaluator:
    """Evaluates pools over one base; prompts and answers are cached in `folder`, which processes may share.

    `answers` names base and generation settings, `width` is the default width of prompt features; bad rows are written below
    `quarantine` and reported to `on_set_aside`; `make_room` is called before actors start. `pull` brings what
    lies elsewhere of prompts and answers.
    """

    def __init__(
        self,
        source: PromptSource,
        folder: Path,
        *,
        answers: str,
        max_new_tokens: int,
        width: int,
        quarantine: Path,
        on_set_aside: Callable[[str, SetAside], None] = lambda task, aside: None,
        make_room: Callable[[], None] = lambda: None,
        pull: Pull = lambda folder, name: None,
    ) -> None:
        self.source, self.max_new_tokens, self.width = source, max_new_tokens, width
        prompts = folder / "prompts"
        self.tables = PromptTables(source, prompts, quarantine=quarantine, on_set_aside=on_set_aside, pull=pull)
        self.store = AnswerStore(folder / "answers" / answers, pull)
        self.generated = 0
        """Number of answers that this object has generated."""
        self._make_room = make_room
        self._routers: Routers | None = None
        """Those of the last pool, of which the next one's are made: a task's evaluation then costs what its own expert does."""
        self._results: dict[tuple[str, str], tuple[Any, TaskResult]] = {}

    def actors(self) -> PredictorActors:
        """Returns predictors for a `with` around several evaluations: the base is loaded once for all."""
        source = self.source
        vision = source.data.vision_cache == "off"
        return PredictorActors(
            PagePredictor, source.base, source.workers, vision, workers=source.workers, make_room=self._make_room
        )

    def evaluate(
        self,
        tasks: Sequence[EvalTask],
        pool: Pool | None,
        *,
        key: str = "",
        folder: Folder | None = None,
        mode: Mode = "routed",
        samples: int = SAMPLES,
        actors: PredictorActors | None = None,
    ) -> Evaluation:
        """Answers the prompts of these tasks and scores each by its task's metric.

        A `pool` of None is the bare base. `key` and `folder` are the pool's name and folder, for routers that mix; `samples`
        predictions per task are kept. `actors` are used if given; otherwise new ones are started as needed.
        """
        authors, routers = Authors(pool, key, folder), routers_of(pool, self._routers)
        self._routers = routers or self._routers
        width = (pool.width if pool is not None else None) or self.width
        with nullcontext(actors) if actors is not None else self.actors() as predictors:
            tables = self.tables.of(tasks, width, predictors)
            features = [table.features_NF for table in tables]
            ranked = ranking(routers, mode, features)
            chosen = choices(routers, mode, [task.name for task in tasks], features, ranked)
            self._generate(tasks, tables, chosen, authors, predictors)
        shown = torch.cat([features_NF[:samples] for features_NF in features])
        why = iter(reasons(routers, mode, shown) if samples else ())
        owners = [authors.own_of(task.name) for task in tasks]
        names, counts = [] if routers is None else routers.pool.names, [len(features_NF) for features_NF in features]
        calibrated = dict(zip([t.name for t in tasks], calibrations(names, owners, counts, ranked), strict=True))
        if routers is not None and routers.known_prompts is not None:
            routers.known_prompts.release()
        results = {}
        for task, table, choice in zip(tasks, tables, chosen, strict=True):
            own = authors.own_of(task.name) if mode == "routed" else None
            result = self._result(name_of(task, width), task, table, choice, authors, samples, own)
            shown_samples = tuple(replace(s, why=next(why)) for s in result.samples)
            results[task.name] = replace(result, samples=shown_samples, calibration=calibrated[task.name])
        return Evaluation(results)

    def record(self, task: EvalTask, pool: Pool, actors: PredictorActors) -> EvaluatedPrompts:
        """Returns a task's prompts with the scores of its expert in `pool` and of the base, as far as they have answered."""
        (table,) = self.tables.of([task], pool.width or self.width, actors)
        authors = [dict(zip(pool.names, pool.digests, strict=True)).get(task.name), BASE]
        answers = [self.store.of(author, table.prompts.tolist()) if author else {} for author in authors]
        ids, questions, groups, scores = [], [], [], []
        for prompt, id, question, reference in table.rows(["prompt", "id", "question", "reference"]):
            texts = [of[prompt].text if prompt in of else None for of in answers]
            given = [scored(task.name, task.config.metric, id, question, reference, text or "", "") for text in texts]
            ids.append(id)
            questions.append(question)
            groups.append(given[0].group)
            scores.append([math.nan if text is None else p.score for text, p in zip(texts, given, strict=True)])
        own_N, base_N = np.array(scores, np.float64).reshape(-1, 2).T
        return EvaluatedPrompts(ids, questions, groups, table.features_NF.numpy(), own_N, base_N)

    def _generate(
        self,
        tasks: Sequence[EvalTask],
        tables: Sequence[PromptTable],
        chosen: Sequence[np.ndarray],
        authors: Authors,
        actors: PredictorActors,
    ) -> None:
        """Generates all missing answers."""
        due = []
        for task, table, choice in zip(tasks, tables, chosen, strict=True):
            if pages := self._missing_answers(table, choice, authors):
                due.append((task, table, pages))
        compute_image_embeds(self.source, [task for task, _, _ in due], actors)
        pieces = (
            (request, authors.work(request, location, self.max_new_tokens))
            for task, table, pages in due
            for request, location in self._located(task, table, pages, actors)
        )
        try:
            for request, answers in actors.run(pieces):
                self.generated += self.store.add(
                    authors.key_of(request.choice), dict(zip(request.prompts, answers, strict=True))
                )
        finally:
            self.store.flush()

    def _missing_answers(
        self, table: PromptTable, choice: np.ndarray, authors: Authors
    ) -> dict[tuple[int, ...], list[PageRequest]]:
        """Returns a task's missing answers by page: the whole page for an expert, single prompts where Linears choose."""
        requests: dict[tuple[int, ...], list[PageRequest]] = {}
        for value in np.unique(choice).tolist():
            prompts = table.prompts[choice == value].tolist()
            answered = self.store.of(authors.key_of(value), prompts)
            missing = {prompt for prompt in prompts if prompt not in answered}
            for page in table.pages(self.source.workers.batch_size) if missing else []:
                mine = [row for row in page if choice[row] == value and table.prompts[row] in missing]
                if mine:
                    rows = mine if value == MIXED else list(page)
                    requests.setdefault(page, []).append(PageRequest(value, tuple(table.prompts[rows])))
        return dict(sorted(requests.items()))

    def _located(
        self,
        task: EvalTask,
        table: PromptTable,
        pages: Mapping[tuple[int, ...], Sequence[PageRequest]],
        actors: PredictorActors,
    ) -> Iterator[tuple[PageRequest, Slices]]:
        """Yields the requests of a task's pages with their rows, as soon as these are read."""
        needed = []
        for page, of_page in pages.items():
            prompts = {prompt for request in of_page for prompt in request.prompts}
            needed.append([row for row in page if table.prompts[row] in prompts])
        numbers, number_of = table.reading([row for page in needed for row in page])
        rows = actors.beside(self.source.rows(task.name, task.part, numbers))
        locations = slices(blocks(rows), ([number_of[row] for row in page] for page in needed))
        try:
            for of_page, location in zip(pages.values(), locations, strict=True):
                yield from ((request, location) for request in of_page)
        except LookupError:
            raise StreamError(
                f"task {task.name!r}: rows of {task.part.source.path} are gone since this run began; leave files as they "
                "are while a job runs, and run the same command again"
            ) from None

    def _result(
        self,
        name: str,
        task: EvalTask,
        table: PromptTable,
        choice: np.ndarray,
        authors: Authors,
        samples: int,
        own: str | None,
    ) -> TaskResult:
        """Scores a task's answers; reuses the last result where the same authors answer."""
        keys = {value: authors.key_of(value) for value in np.unique(choice).tolist()}
        metric, same = task.config.metric, (choice.tobytes(), tuple(keys.values()), samples, own)
        before = self._results.get((name, metric))
        if before is not None and before[0] == same:
            return before[1]
        predictions = []
        rows = table.rows(["prompt", "id", "question", "reference"])
        for value, (prompt, id, question, reference) in zip(choice.tolist(), rows, strict=True):
            answer = self.store.of(keys[value], [])[prompt]
            expert = answer.expert if value == MIXED else authors.name_of(value)
            predictions.append(scored(task.name, metric, id, question, reference, answer.text, expert))
        result = TaskResult.of(predictions, samples, own=own)
        self._results[name, metric] = same, result
        return result
