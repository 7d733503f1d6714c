"""Evaluation step by step on a real Ray: what is found, and who had to answer for it."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from ray.data.expressions import col
from ray.exceptions import RayError

from cluster.local import connect
from pipeline.config import BaseModelConfig, DataConfig, SourceConfig, TaskConfig
from pipeline.data.encoded.encoding import TaskRows
from pipeline.data.encoded.packing import unpack
from pipeline.data.errors import StreamError
from pipeline.data.loading.prompts import PromptSource
from pipeline.evaluation.actors import PredictorActors
from pipeline.evaluation.choices import SHOWN, format_candidates
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.predictor import PagePredictor, Predictor
from pipeline.evaluation.prompts import EvalTask
from pipeline.evaluation.results import Evaluation
from pipeline.models.encoding import Encoded
from pipeline.models.inference import InferenceWorkers
from pipeline.routing import Pool
from pipeline.routing.call import Routers
from pipeline.routing.features import WIDEST
from pipeline.routing.insight import candidates_of_call
from pipeline.routing.routes import MIXED
from tests.helpers import CLAIMS

pytestmark = pytest.mark.ray

WORKERS = InferenceWorkers(cpus_per_worker=1, batch_size=5)
ALL = 1000
"""More samples than a column has prompts."""


@pytest.fixture(scope="module")
def actors(tiny_folder: Path) -> Iterator[PredictorActors]:
    connect()
    base = BaseModelConfig(path=str(tiny_folder))
    with PredictorActors(PagePredictor, base, WORKERS, True, workers=WORKERS) as actors:
        yield actors


@pytest.fixture(scope="module")
def pool(known_pool: Pool) -> Pool:
    """The experts of `known_pool`, each with a digest of its own."""
    experts = [replace(e, card=e.card.model_copy(update={"config_digest": n})) for n, e in known_pool.experts.items()]
    return with_experts(known_pool, experts)


def with_experts(pool: Pool, experts: Sequence, **router: object) -> Pool:
    bare = Pool(pool.base_label, pool.base_fingerprint, pool.router, experts, pool.null, pool.null_layer_statistics)
    return bare.routed_by(**router)


def first(pool: Pool, count: int, **router: object) -> Pool:
    return with_experts(pool, list(pool.experts.values())[:count], **router)


def eval_task(name: str, source: SourceConfig, metric: str = "exact_match") -> EvalTask:
    task = TaskConfig(name=name, eval=source, metric=metric)
    return EvalTask(task, TaskRows(source, key=f"{name}-{source.limit}", metric=metric))


@pytest.fixture(scope="module")
def eval_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[EvalTask]:
    """Image rows and text rows of the abilities that the experts claim, rotations of questions, rows in groups."""
    folder = tmp_path_factory.mktemp("rows")
    abilities = [*CLAIMS.values(), "direction"]
    tasks = [eval_task(f, SourceConfig(path=f"demo://{f}/eval", limit=8 + n)) for n, f in enumerate(abilities)]
    lines = ["index\tquestion\tA\tB\tC\tanswer\timage"]
    for number, color in enumerate(("red", "blue", "green")):
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), color).save(stream, format="PNG")
        image = base64.b64encode(stream.getvalue()).decode()
        lines.append(f"{number}\twhat color is it ?\tred\tblue\tgreen\t{'ABC'[number]}\t{image}")
    (folder / "mmbench.tsv").write_text("\n".join(lines) + "\n")
    tasks.append(eval_task("rotated", SourceConfig(path=str(folder / "mmbench.tsv"), preset="mmbench"), "mmbench"))
    rows = [{"q": f"repeat : {n} {n % 3} .", "a": f"{n} {n % 3}", "g": f"g{n // 2}"} for n in range(7)]
    (folder / "grouped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"q": "no answer"}]))
    source = SourceConfig(path=str(folder / "grouped.jsonl"), columns={"question": "q", "answer": "a", "group": "g"})
    tasks.append(eval_task("grouped", source))
    return tasks


def evaluator(tiny_folder: Path, folder: Path, **more: object) -> Evaluator:
    source = PromptSource(
        BaseModelConfig(path=str(tiny_folder)),
        DataConfig(max_bad_share=0.5),
        folder / "demo",
        folder / "features",
        WORKERS,
    )
    settings = {"answers": "a", "max_new_tokens": 3, "width": WIDEST, "quarantine": folder / "quarantine"}
    return Evaluator(source, folder, **(settings | more))


class Nobody(PredictorActors):
    """Actors of whom nothing may be asked."""

    def _start(self) -> None:
        raise AssertionError("a base is needed")


def nobody(tiny_folder: Path) -> PredictorActors:
    return Nobody(PagePredictor, BaseModelConfig(path=str(tiny_folder)), WORKERS, True, workers=WORKERS)


@pytest.fixture(scope="module")
def grown(
    tiny_folder: Path,
    pool: Pool,
    eval_tasks: list[EvalTask],
    actors: PredictorActors,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Evaluator, list[Evaluation]]:
    """An evaluator that has seen the base, then pools of one, two and three experts; what it found."""
    evaluator_ = evaluator(tiny_folder, tmp_path_factory.mktemp("grown"))
    steps = [None, first(pool, 1), first(pool, 2), pool]
    return evaluator_, [evaluator_.evaluate(eval_tasks, step, samples=ALL, actors=actors) for step in steps]


@pytest.fixture
def from_nothing(tiny_folder: Path, eval_tasks: list[EvalTask], actors: PredictorActors, tmp_path: Path):
    """Evaluates in a folder where nothing is known."""

    def evaluate(pool: Pool | None, eval_tasks: list[EvalTask] = eval_tasks, **more: object) -> Evaluation:
        return evaluator(tiny_folder, tmp_path).evaluate(eval_tasks, pool, samples=ALL, actors=actors, **more)

    return evaluate


def encoded(evaluator: Evaluator, eval_tasks: list[EvalTask]) -> list[Encoded]:
    """The good rows of all columns."""
    rows = [evaluator.source.rows(task.name, task.part).filter(expr=col("reason") == "") for task in eval_tasks]
    return [row for dataset in rows for batch in dataset.iter_batches(batch_format="numpy") for row in unpack(batch)]


def test_step_by_step_finds_what_from_nothing_finds(
    grown, pool: Pool, eval_tasks: list[EvalTask], from_nothing
) -> None:
    _, steps = grown
    assert all(one != other for one, other in pairwise(steps))
    assert from_nothing(pool) == steps[-1]


def test_it_finds_what_a_routed_base_answers(grown, pool: Pool, eval_tasks: list[EvalTask], tiny_folder: Path) -> None:
    """All prompts in one pass, with the whole pool attached, as a served pool answers them."""
    evaluator_, steps = grown
    predictor, rows = Predictor(BaseModelConfig(path=str(tiny_folder)), WORKERS), encoded(evaluator_, eval_tasks)
    predictor.attach(pool)
    answers = predictor.by_router(rows, 3)
    assert [(s.prediction, s.expert) for s in steps[-1].samples] == [(a.text, a.expert) for a in answers]
    with predictor.routed.call() as call:
        predictor.read(rows)
    why = [format_candidates(candidates) for candidates in candidates_of_call(call, limit=SHOWN)]
    assert [s.why for s in steps[-1].samples] == why
    assert {s.expert for s in steps[-1].samples} == {*CLAIMS, "base"}


def test_nothing_is_answered_twice(grown, pool: Pool, eval_tasks: list[EvalTask], tiny_folder: Path) -> None:
    """By the same evaluator, by one of another process, and for a pool that is given the tasks."""
    evaluator_, steps = grown
    later, evaluated = (
        evaluator(tiny_folder, evaluator_.store.folder.parents[1]),
        eval_tasks[:-1],
    )  # the last one has a bad row
    for again in (evaluator_, later):
        result = again.evaluate(evaluated, pool, samples=ALL, actors=nobody(tiny_folder))
        assert result.results == {c.name: steps[-1].results[c.name] for c in evaluated}
    assert later.generated == 0
    oracle = later.evaluate(eval_tasks[:4], pool, mode="oracle", samples=ALL, actors=nobody(tiny_folder))
    assert {s.expert for s in oracle.samples} == {"base"}  # no expert bears the name of an ability


def test_an_expert_that_is_replaced_answers_anew(
    grown, pool: Pool, eval_tasks: list[EvalTask], actors: PredictorActors, from_nothing, tmp_path: Path
) -> None:
    """From a pool's folder, whose experts are read when they are needed."""
    evaluator_, steps = grown
    painter = pool.experts["painter"]
    other = replace(
        painter,
        card=painter.card.model_copy(update={"config_digest": "painter_again"}),
        adapters={path: replace(adapter, b_OR=adapter.b_OR.flip(0)) for path, adapter in painter.adapters.items()},
    )
    before, replaced = evaluator_.generated, Pool.load(pool.add(other).save(tmp_path / "pool"))
    result = evaluator_.evaluate(eval_tasks, replaced, samples=ALL, actors=actors)
    assert result != steps[-1]
    assert result == from_nothing(replaced)
    pages = {s.task for s in result.samples if s.expert == "painter"}
    sizes = {task: len(of.samples) for task, of in result.results.items()}
    assert evaluator_.generated - before <= sum(sizes[task] for task in pages)


@pytest.mark.parametrize("router", [{"shrinkage": 0.9}, {"null": ()}])
def test_other_settings_of_the_router_ask_who_is_chosen_now(
    grown, pool: Pool, eval_tasks: list[EvalTask], actors: PredictorActors, from_nothing, router: dict
) -> None:
    evaluator_, steps = grown
    null = router.pop("null", pool.null)
    other = Pool(pool.base_label, pool.base_fingerprint, pool.router, pool.experts.values(), null).routed_by(**router)
    result = evaluator_.evaluate(eval_tasks, other, samples=ALL, actors=actors)
    assert result != steps[-1]
    assert result == from_nothing(other)


def test_a_limit_finds_the_first_rows(
    grown, pool: Pool, eval_tasks: list[EvalTask], actors: PredictorActors, from_nothing
) -> None:
    evaluator_, _ = grown
    fewer = [eval_task(c.name, c.part.source.model_copy(update={"limit": 5})) for c in eval_tasks[:4]]
    expected = from_nothing(pool, fewer)
    assert [len(result.samples) for result in expected.results.values()] == [5] * 4
    before = evaluator_.generated
    assert evaluator_.evaluate(fewer, pool, samples=ALL, actors=actors) == expected
    assert evaluator_.generated == before


def alike(pool: Pool) -> Pool:
    """The pool with a twin of its first expert, so that the prompts of both are an open question."""
    one = next(iter(pool.experts.values()))
    card = one.card.model_copy(update={"name": "twin", "task": "twin", "config_digest": "twin"})
    return pool.add(replace(one, card=card))


def test_what_two_levels_leave_open_is_the_pools_answer(
    grown, pool: Pool, eval_tasks: list[EvalTask], actors: PredictorActors, tiny_folder: Path, tmp_path: Path
) -> None:
    evaluator_, _ = grown
    open_ = alike(pool).routed_by(kind="two_level")
    folder, before = open_.save(tmp_path / "pool"), evaluator_.generated
    result = evaluator_.evaluate(eval_tasks, open_, key="twins", folder=folder, samples=ALL, actors=actors)
    features_BF = torch.cat([table.features_NF for table in evaluator_.tables.of(eval_tasks, WIDEST, actors)])
    mixed = int((Routers(open_).router.choices(features_BF) == MIXED).sum())
    assert 0 < mixed < len(result.samples)
    assert evaluator_.generated - before == len(set(evaluator_.store.of("pool-twins", []))) == mixed
    predictor = Predictor(BaseModelConfig(path=str(tiny_folder)), WORKERS)
    predictor.attach(open_)
    answers = predictor.by_router(encoded(evaluator_, eval_tasks), 3)
    assert [(s.prediction, s.expert) for s in result.samples] == [(a.text, a.expert) for a in answers]


def test_answers_of_a_token_router_are_the_pools_and_kept(
    grown, pool: Pool, eval_tasks: list[EvalTask], actors: PredictorActors, tiny_folder: Path, tmp_path: Path
) -> None:
    evaluator_, _ = grown
    tokens = pool.routed_by(kind="token", token_scores="phatgoose")
    folder, before = tokens.save(tmp_path / "pool"), evaluator_.generated
    result = evaluator_.evaluate(eval_tasks, tokens, key="tokens", folder=folder, samples=ALL, actors=actors)
    assert evaluator_.generated - before == len(result.samples)
    again = evaluator_.evaluate(eval_tasks, tokens, key="tokens", samples=ALL, actors=nobody(tiny_folder))
    assert again == result


def test_bad_rows_are_written_down_and_told(
    grown, eval_tasks: list[EvalTask], tiny_folder: Path, actors, tmp_path: Path
) -> None:
    reported = []
    one = evaluator(tiny_folder, tmp_path, on_set_aside=lambda name, aside: reported.append((name, str(aside))))
    result = one.evaluate(eval_tasks[-1:], None, actors=actors)
    assert sum(result.results["grouped"].experts.values()) == 7
    assert reported == [("grouped", "1 bad row set aside")]
    assert "answer" in (tmp_path / "quarantine" / "grouped.jsonl").read_text()
    assert not list((tmp_path / "prompts").glob("*"))  # what cannot be used today is looked at again tomorrow


def test_rows_that_change_meanwhile_are_told(
    grown, pool: Pool, tiny_folder: Path, actors: PredictorActors, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"q": f"repeat : {n} .", "a": str(n)}) for n in range(6)]
    file.write_text("\n".join(lines))
    one = evaluator(tiny_folder, tmp_path)
    changing = eval_task("changing", SourceConfig(path=str(file), columns={"question": "q", "answer": "a"}))
    one.tables.of([changing], WIDEST, actors)
    for changed, message in ([*lines[:4], *lines[3:5]], "have changed since this run began"), (lines[:4], "are gone"):
        file.write_text("\n".join(changed))
        with pytest.raises((StreamError, RayError), match=f"task 'changing': .*{message}"):
            one.evaluate([changing], None, actors=actors)


def test_files_may_lie_elsewhere_the_next_time(
    pool: Pool, tiny_folder: Path, actors: PredictorActors, tmp_path: Path
) -> None:
    """As the demo's do after an earlier release: the rows are the same, so their table is found, but not where they were."""
    lines = [json.dumps({"q": f"repeat : {n} .", "a": str(n)}) for n in range(4)]
    for number, folder in enumerate(("before", "after")):
        file = tmp_path / folder / "rows.jsonl"
        file.parent.mkdir()
        file.write_text("\n".join(lines))
        moved = eval_task("moved", SourceConfig(path=str(file), columns={"question": "q", "answer": "a"}))
        one = evaluator(tiny_folder, tmp_path)
        result = one.evaluate([moved], pool if number else None, mode="single" if number else "routed", actors=actors)
        assert one.generated == sum(result.results["moved"].experts.values()) == 4
        if not number:
            file.unlink()
