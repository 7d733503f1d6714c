"""Sets the learned pool beside what one would do instead, at equal steps a task, in one table.

python -m jobs.compare jobs/configs/embedded.yaml

base             the frozen base
specialist       each task's expert, told which task a prompt belongs to (the upper bound of routing)
sequential       one LoRA, fine-tuned on task after task
multitask        one LoRA, trained on all tasks' data at once
token_published  the pool, routed token by token (the paper's router)
token            the pool, every Linear for itself, by evidence
prompt           the pool, one closed-form decision a prompt
two_level        the pool, a short list by prompt, weighed by Linear
"""

from typing import Any

import torch

from jobs.learn import Learned, learn_stream, publish, show, where_next
from jobs.options import Address, ConfigFile, Overrides, job_command, load, user_errors
from jobs.state import Stopwatch, write_json
from jobs.stream_run import StreamRun, open_run
from jobs.terminal import methods_table
from pipeline.config import digest
from pipeline.evaluation.results import Evaluation
from pipeline.routing.adapters import load_adapters
from pipeline.routing.expert import Expert, ExpertCard
from pipeline.routing.pool import Pool
from pipeline.routing.statistics import PromptStatistics
from pipeline.training.session import Trained

ROUTERS: dict[str, dict[str, str]] = {
    "token_published": {"kind": "token", "token_scores": "published"},
    "token": {"kind": "token", "token_scores": "evidence"},
    "prompt": {"kind": "prompt"},
    "two_level": {"kind": "two_level"},
}
"""Router settings by the name that results bear."""


def compare_methods(run: StreamRun, learned: Learned) -> dict[str, Any]:
    """Trains and evaluates the other methods; returns the summary's `methods`."""
    tasks = learned.summary["tasks"]
    samples = sum(t["samples"] for t in tasks.values())
    expert_seconds = sum(t["expert_seconds"] for t in tasks.values())
    all_seconds = expert_seconds + sum(t["router_seconds"] for t in tasks.values())
    columns = list(run.columns)

    def routed(name: str) -> Evaluation:
        pool = learned.pool.routed_by(**ROUTERS[name])
        folder = pool.save(run.folder / "methods" / f"pool-{name}")
        return run.evaluate(columns, pool, run.pool_key(pool), folder=folder)

    told = run.evaluate(columns, learned.pool, digest(learned.pool_digest), mode="told")
    sequential, sequential_figures = _sequential(run)
    multitask, multitask_figures = _multitask(run)
    return {
        "base": _method(run, run.evaluate(columns, None, "base"), 0, 0.0),
        "specialist": _method(run, told, samples, expert_seconds),
        "sequential": _method(run, sequential, **sequential_figures),
        "multitask": _method(run, multitask, **multitask_figures),
        **{name: _method(run, routed(name), samples, all_seconds) for name in ROUTERS},
    }


def _method(run: StreamRun, evaluation: Evaluation, samples: int, seconds: float) -> dict[str, Any]:
    accuracies = evaluation.accuracies()
    new = [accuracies[task.name] for task in run.config.stream.tasks]
    old = [accuracies[task.name] for task in run.config.stream.foundation]
    return {
        "new": sum(new) / len(new),
        "foundation": sum(old) / len(old) if old else None,
        "samples": samples,
        "seconds": seconds,
        "columns": accuracies,
        "columns_by_row": evaluation.row_accuracies(),
    }


def _sequential(run: StreamRun) -> tuple[Evaluation, dict[str, Any]]:
    """One LoRA goes from task to task."""
    adapter, key, figures = None, "sequential", {"samples": 0, "seconds": 0.0}
    for number, task in enumerate(run.config.stream.tasks):
        run.terminal.say(
            f"[bold]sequential fine-tuning {number + 1}/{len(run.config.stream.tasks)}: {task.name}[/bold]"
        )
        key = digest(key, run.identity.expert(task))
        start = str(adapter) if adapter else None
        trained = run.train(
            *run.job(task, key, task=f"sequential_{task.name}", start=start, router_stage=False, validation=0.0)
        )
        adapter = trained.adapter
        run.release(task)
        figures["samples"] += trained.figures["samples"]
        figures["seconds"] += trained.figures["expert_seconds"]
    return _only(run, "sequential", trained, key), figures


def _multitask(run: StreamRun) -> tuple[Evaluation, dict[str, Any]]:
    """One LoRA sees all tasks' rows, in as many steps as all experts together."""
    tasks = run.config.stream.tasks
    run.terminal.say(f"[bold]multi-task training on all {len(tasks)} tasks[/bold]")
    key = digest("multitask", [run.identity.expert(task) for task in tasks])
    expert = run.config.expert.model_copy(update={"steps": run.config.expert.steps * len(tasks)})
    changes = {"task": "multitask", "data_fingerprint": key, "expert": expert, "router_stage": False, "validation": 0.0}
    with run.terminal.working(f"reading {len(tasks)} tasks"):
        rows = run.all_training_rows()
    trained = run.train(run.job_alone(tasks[0], key, **changes), rows)
    figures = {"samples": trained.figures["samples"], "seconds": trained.figures["expert_seconds"]}
    return _only(run, "multitask", trained, key), figures


def _only(run: StreamRun, name: str, trained: Trained, key: str) -> Evaluation:
    """Evaluates a single adapter that answers everything."""
    config, adapters = load_adapters(trained.adapter)
    card = ExpertCard(
        name=name,
        task=name,
        base_fingerprint=run.fingerprint,
        rank=run.config.expert.rank,
        alpha=run.config.expert.lora_alpha,
        seed=run.config.seed,
        data_fingerprint=key,
        config_digest=key,
        samples=trained.figures["samples"],
    )
    nothing = PromptStatistics.of(torch.zeros(1, 1))  # nobody routes to it
    pool = Pool(
        run.config.base.label, run.fingerprint, run.config.router, [Expert(card, config, adapters, {}, nothing)]
    )
    return run.evaluate(list(run.columns), pool, key, mode="only")


def main(config: ConfigFile, overrides: Overrides = None, address: Address = None) -> None:
    """Compare the learned pool with base, specialists, sequential and multi-task fine-tuning (learns first if need be)."""
    with user_errors():
        settings = load(config, overrides)
        if address:
            job_command("jobs.compare", config, overrides, address)
        with open_run(settings, job="compare") as run:
            learned = learn_stream(run)
            watch = Stopwatch(run.folder / "state" / "clock-compare.json")
            methods = compare_methods(run, learned)
            write_json(run.folder / "methods.json", methods)
            summary = learned.summary | {
                "methods": methods,
                "seconds_total": learned.summary["seconds_total"] + watch.lap(),
                "peak_memory_bytes": run.memory.bytes,
            }
            run.log(
                [(f"{m}/{k}", v[k], 0) for m, v in methods.items() for k in ("new", "foundation") if v[k] is not None],
            )
            report = publish(run, summary)
            show(run, summary)
            run.terminal.console.print(methods_table(methods))
            where_next(run, report)


if __name__ == "__main__":
    import typer

    typer.run(main)
