"""Measures how well routers choose: on the stream that was learned, and in a pool of many synthetic experts.

    python -m jobs.benchmark routers                            the prompt router alone (`router_scale`)
    python -m jobs.benchmark routers jobs/configs/demo.yaml

- The stream's pool (learned first, where it is not yet), answered by the bare base, by oracle routing,
  and by every router; `_without_null` are those without the base prompts, that is without a null expert.
- Many experts: tasks of `data.demo.synthetic`, each learned in seconds by a plain loop in this process (many Ray
  Train runs would take an hour and teach nothing about routing), then all in one pool.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Annotated, Any

import torch
import typer

from jobs.benchmark.router_scale import router_alone
from jobs.benchmark.tools.plain_loop import plain_steps, shuffled_batches
from jobs.endings import user_errors
from jobs.options import Overrides, load
from jobs.pretrain_tiny import encode_examples
from jobs.terminal import Terminal, table
from pipeline.config import LearnConfig, digest
from pipeline.data.demo import synthetic
from pipeline.files import write_json
from pipeline.learning.baselines import ROUTERS
from pipeline.learning.learn import LearnResult, learn_stream
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.learning.summary import session_provenance
from pipeline.models.bases import Base, load_base
from pipeline.models.encoding import Encoded, collate
from pipeline.models.generation import generate_answers
from pipeline.provenance import now
from pipeline.routing import Expert, ExpertCard, Pool, PromptStatistics, RoutedModel
from pipeline.routing.adapters import load_adapters
from pipeline.routing.features import feature_width
from pipeline.training.lora import with_lora
from pipeline.training.statistics_collector import LayerInputCollector, collect_features

WITHOUT_NULL = ("prompt", "two_level")
"""Routers that are also measured without base prompts."""
STEPS, RATE, TRAIN_ROWS, PROMPTS = 120, 4e-3, 600, 50
"""Of a synthetic expert: optimizer steps, learning rate, rows to learn from, prompts it is measured on."""

Many = Annotated[int, typer.Option(help="Synthetic experts in one pool; 0 leaves them out.", min=0, max=1000)]


Config = Annotated[Path | None, typer.Argument(help="YAML file of a stream, e.g. jobs/configs/demo.yaml.")]
Output = Annotated[Path, typer.Option(help="Folder for the summary, where no CONFIG names one.")]


def routers(
    config: Config = None, overrides: Overrides = None, many: Many = 50, output: Output = Path("runs/benchmark-routers")
) -> None:
    """Without CONFIG: the prompt router alone, among 10 to 10,000 synthetic experts. With it: routing accuracy there."""
    with user_errors():
        if config is None:
            router_alone(output, Terminal())
            return
        settings = load(config, overrides)
        with open_session(settings, job="benchmark routers", progress=Terminal()) as session:
            started = now()
            summary = session_provenance(session, started) | _on_the_stream(session, learn_stream(session))
            file = session.folder.parent / "benchmark-routers" / "summary.json"
            write_json(file, summary)
            _show_stream(session, summary)
            if many:
                session.progress.log(f"learning {many} synthetic tasks")
                empty = Pool(settings.base.label, session.fingerprint, settings.router, **session.null_expert())
                summary["many"] = among_many(load_base(settings.base), empty, settings, many, log=session.progress.log)
                write_json(file, summary)
                _show_many(session, summary["many"])
            session.progress.log(f"summary    {file}")


def _on_the_stream(session: StreamSession, learned: LearnResult) -> dict[str, Any]:
    """Evaluates every router on the stream's tasks and benchmarks."""
    names, tasks = list(session.data.eval_tasks), [task.name for task in session.config.stream.tasks]
    benchmarks = [task.name for task in session.config.stream.benchmarks]

    def measured(pool: Pool | None, name: str, mode: Any = "routed") -> dict[str, Any]:
        session.progress.log(f"  {name}")
        folder = pool.save(session.folder / "routers" / name) if pool else None
        if pool is None:
            key = "base"
        elif mode == "oracle":
            key = digest(learned.pool_digest)
        else:  # as `compare` names them, so that nothing is answered twice
            key = session.pool_key(pool) if pool.null else digest(session.pool_key(pool), "no null expert")
        result = session.evaluate(names, pool, key, mode, folder=folder)
        accuracy = result.accuracies()
        return {
            "new": fmean(accuracy[name] for name in tasks),
            "base_abilities": fmean(accuracy[name] for name in benchmarks) if benchmarks else None,
            "routing_accuracy": result.routing_accuracy(tasks),
            "columns": accuracy,
        }

    pool = learned.pool
    results = {name: measured(pool.routed_by(**settings), name) for name, settings in ROUTERS.items()}
    bare = Pool(pool.base_label, pool.base_fingerprint, pool.router, pool.experts.values())
    for name in WITHOUT_NULL:
        results[f"{name}_without_null"] = measured(bare.routed_by(**ROUTERS[name]), f"{name}_without_null")
    return {
        "base": measured(None, "base"),
        "oracle": measured(pool, "oracle", "oracle"),
        "routers": results,
    }


def _show_stream(session: StreamSession, summary: Mapping[str, Any]) -> None:
    oracle, base = summary["oracle"], summary["base"]
    rows = [["base", f"{base['new']:.3f}", _text(base["base_abilities"]), "", "", ""]]
    rows.append(["oracle routing", f"{oracle['new']:.3f}", _text(oracle["base_abilities"]), "1.000", "", ""])
    for name, r in summary["routers"].items():
        kept = r["base_abilities"] / base["base_abilities"] if base["base_abilities"] else None
        ratio = r["new"] / oracle["new"] if oracle["new"] else None
        rows.append(
            [
                name,
                f"{r['new']:.3f}",
                _text(r["base_abilities"]),
                _text(ratio),
                _text(kept),
                f"{r['routing_accuracy']:.3f}",
            ]
        )
    header = ["router", "new tasks", "base abilities", "/ oracle", "/ base", "routing"]
    session.progress.show(table("Routers on the stream", header, rows))


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def among_many(
    base: Base, empty: Pool, config: LearnConfig, many: int, *, log: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Trains `many` synthetic experts and measures each alone (told) and in a pool of all.

    `empty` is a pool without experts, with the null expert. Returns the summary's part `many`.
    """
    torch.set_num_threads(config.training.cpus_per_worker)
    experts, started = [], monotonic()
    for number in range(many):
        experts.append(_synthetic_expert(base, config, number))
        if (number + 1) % 10 == 0:
            left = (monotonic() - started) / (number + 1) * (many - number - 1)
            log(f"  {number + 1} of {many} synthetic tasks learned, {left:.0f} s left")
    pool = Pool(
        empty.base_label, empty.base_fingerprint, empty.router, experts, empty.null, empty.null_layer_statistics
    )
    examples = {name: list(synthetic.examples(i, PROMPTS, held_out=True)) for i, name in enumerate(pool.names)}
    encoded = {name: encode_examples(base.processor, rows, answer=False) for name, rows in examples.items()}
    answers = {name: [row.answer for row in rows] for name, rows in examples.items()}
    routed = RoutedModel(base.model, pool)
    oracle = {}
    for name, rows in encoded.items():
        with routed.forced(name):
            oracle[name] = _accuracy(base, rows, answers[name])
    results: dict[str, Any] = {"experts": many, "oracle": fmean(oracle.values()), "routers": {}}
    for router, settings in ROUTERS.items():
        if router == "token_phatgoose":
            continue  # it needs routing vectors, which these experts do without
        routed.load(pool.routed_by(**settings))
        quality, right = {}, []
        for name, rows in encoded.items():
            quality[name] = _accuracy(base, rows, answers[name])
            right.append(fmean(decision.expert == name for decision in routed.decisions))
        results["routers"][router] = {
            "new": fmean(quality.values()),
            "routing_accuracy": fmean(right),
            "largest_loss": max(oracle[name] - quality[name] for name in oracle),
        }
    routed.detach()
    return results


def _show_many(session: StreamSession, results: Mapping[str, Any]) -> None:
    rows = [["oracle routing", f"{results['oracle']:.3f}", "", ""]]
    for name, r in results["routers"].items():
        rows.append([name, f"{r['new']:.3f}", f"{r['routing_accuracy']:.3f}", f"{r['largest_loss']:.3f}"])
    header = ["router", "new tasks", "routing", "largest loss of a task"]
    session.progress.show(table(f"Routers among {results['experts']} synthetic experts", header, rows))


def _accuracy(base: Base, rows: Sequence[Encoded], answers: Sequence[str]) -> float:
    """Answers one task's prompts as a batch; returns the share that is right."""
    given = generate_answers(base.model, base.processor, rows, max_new_tokens=6)
    return fmean(a == b for a, b in zip(given, answers, strict=True))


def _synthetic_expert(base: Base, config: LearnConfig, number: int) -> Expert:
    """Learns a synthetic task in this process: the LoRA, and the statistics that routers need; no routing vectors."""
    name = f"synthetic_{number:03d}"
    rows = encode_examples(base.processor, list(synthetic.examples(number, TRAIN_ROWS, held_out=False)))
    settings = config.expert.model_copy(update={"steps": STEPS, "learning_rate": RATE})
    pad = base.processor.tokenizer.pad_token_id
    torch.manual_seed(config.seed + number)
    model: Any = with_lora(base, settings)
    plain_steps(model, settings, shuffled_batches(rows, settings.batch_size, pad_token_id=pad))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter_config, adapters = load_adapters(folder)
    width = feature_width(base.width, config.router.feature_width)
    parts = [rows[start : start + 100] for start in range(0, len(rows), 100)]
    collector = LayerInputCollector(base.model, list(adapters))
    with torch.inference_mode():
        for part in parts:
            batch = collate(part, pad_token_id=pad)
            collector.expect(batch, len(batch["labels"]))
            model(**batch, use_cache=False)
    samples = collector.collect()
    model.unload()
    features, ids = collect_features(base.model, base, parts, width=width, device="cpu")
    router = config.router
    statistics = PromptStatistics.of(features, ids, quantile=router.quantile, shrinkage=router.shrinkage)
    layer_statistics = {path: PromptStatistics.of(sample) for path, sample in samples.items()}
    card = ExpertCard(
        name=name,
        task=name,
        base_fingerprint=base.fingerprint,
        rank=settings.rank,
        alpha=settings.lora_alpha,
        seed=config.seed,
        data_fingerprint=name,
        config_digest=digest(settings, name),
        samples=STEPS * settings.batch_size,
    )
    return Expert(card, adapter_config, adapters, {}, statistics, layer_statistics)
