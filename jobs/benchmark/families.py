"""Proves every family of bases from end to end, on small random models: learned, registered, reloaded elsewhere.

    pointsman benchmark families

For each family: a stream of two tasks is learned by the same job as any other; then another process loads the pool's
version from the registry and must find the same logits and the same experts for the same prompts. For some families the
stream is learned a second time from kept image features (`data.vision_cache`), which must give the same experts.
"""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import mlflow
import typer
from safetensors.torch import load_file
from torch import Tensor

import pipeline
from jobs.benchmark.tools.reload_pool import TOKENS, routed_logits
from jobs.benchmark.tools.small_models import SMALL, write_small
from jobs.endings import user_errors
from jobs.terminal import Terminal, table
from pipeline.config import ConfigError, LearnConfig
from pipeline.data.demo import synthetic
from pipeline.data.sources.reader import first_records
from pipeline.files import write_json
from pipeline.learning.learn import LearnResult, learn_stream
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.models.bases import load_base
from pipeline.provenance import now, provenance
from pipeline.routing import Pool, RoutedModel

TOLERANCE = 1e-5
"""Largest difference of two logits, or of two weights, that counts as none."""

ROWS, QUESTIONS, PROMPTS = 60, 8, 3
"""Rows to learn a task from, prompts that evaluate it, prompts that the other process answers."""

CACHED = ("internvl",)
"""Families that also learn from kept image features, unless the user names others."""


def families(
    family: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SMALL)}; default: all.")] = None,
    cached: Annotated[
        list[str] | None,
        typer.Option(help="Family that also learns with data.vision_cache=features.", show_default=", ".join(CACHED)),
    ] = None,
    tasks: Annotated[int, typer.Option(help="Tasks of the stream.", min=1, max=2)] = 2,
    steps: Annotated[int, typer.Option(help="Steps of the expert stage.", min=1)] = 12,
    output: Annotated[Path, typer.Option(help="Folder for bases, runs, registry and summary.")] = Path(
        "runs/benchmark-families"
    ),
) -> None:
    """Every family of bases on a small random model: learned, registered, reloaded in another process."""
    with user_errors():
        names = family or list(SMALL)
        twice = cached if cached is not None else [name for name in CACHED if name in names]
        if unknown := {*names, *twice} - SMALL.keys():
            raise ConfigError(f"no such family: {', '.join(sorted(unknown))}; there are: {', '.join(SMALL)}")
        proofs = prove(names, twice, output.resolve(), tasks=tasks, steps=steps)
    if not all(proof["proven"] for proof in proofs.values()):
        raise typer.Exit(1)


def prove(names: Sequence[str], cached: Sequence[str], output: Path, *, tasks: int, steps: int) -> dict[str, Any]:
    """Proves families one after the other; returns the summary's `families`, written after every one.

    `cached` learn from kept image features; where they are among `names` as well, their experts are compared.
    """
    started, terminal, proofs = now(), Terminal(), dict[str, Any]()
    summary = {
        **provenance(output.name, started),
        "tasks": tasks,
        "steps": steps,
        "tolerance": TOLERANCE,
        "families": proofs,
    }
    for name in dict.fromkeys((*names, *cached)):
        terminal.log(f"family {name}", "bold")
        plain = None
        if name in names:
            plain, proofs[name] = _proof(stream(name, output, tasks=tasks, steps=steps))
        if name in cached:
            pool, proof = _proof(stream(name, output, tasks=tasks, steps=steps, cached=True))
            if plain is not None:
                proof |= difference(plain, pool)
                proof["proven"] &= proof["weight_difference"] <= TOLERANCE
            proofs[f"{name} (kept)"] = proof
        write_json(output / "summary.json", summary)
    _show(terminal, proofs)
    terminal.log(f"summary    {output / 'summary.json'}")
    return proofs


def stream(name: str, output: Path, *, tasks: int, steps: int, cached: bool = False) -> LearnConfig:
    """Returns a stream of one or two tasks for the small base of a family, which is written into `output`."""
    base = write_small(name, output / "bases" / name)
    label = f"{name}-kept" if cached else name

    def task(of: str) -> dict[str, Any]:
        parts = {"train": ROWS, "eval": QUESTIONS}
        return {"name": of} | {part: {"path": f"demo://{of}/{part}", "limit": n} for part, n in parts.items()}

    learned = [task("successor"), _words(output)] if name == "text" else [task("digits"), task("textures")]
    base_prompts = {"path": f"demo://{'reverse/eval' if name == 'text' else 'general/train'}", "limit": ROWS}
    ability = "repeat" if name == "text" else "shape"
    return LearnConfig.model_validate({
        "name": label,
        "output": str(output),
        "base": {"path": str(base), "name": label},
        "stream": {
            "tasks": learned[:tasks],
            "benchmarks": [
                {"name": ability, "eval": {"path": f"demo://{ability}/eval", "limit": QUESTIONS}}
            ],
            "base_prompts": base_prompts,
        },
        "data": {"vision_cache": "features" if cached else "off"},
        "expert": {"rank": 4, "steps": steps, "batch_size": 8, "learning_rate": 5e-3},
        "router": {"steps": max(1, steps // 3)},
        "training": {"cpus_per_worker": 1},  # models this small only wait for a second one
        "evaluation": {"max_new_tokens": TOKENS},
    })  # fmt: skip


def _words(output: Path) -> dict[str, Any]:
    """Returns a second task without images: words and their translations, written as a user's files."""
    task: dict[str, Any] = {"name": "words"}
    for part, rows in {"train": ROWS, "eval": QUESTIONS}.items():
        file = output / "data" / f"words-{part}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"question": example.question, "answer": example.answer})
            for example in synthetic.examples(0, rows, held_out=part == "eval")
        ]
        file.write_text("\n".join(lines) + "\n")
        task[part] = {"path": str(file), "columns": {"question": "question", "answer": "answer"}}
    return task


def _proof(settings: LearnConfig) -> tuple[Pool, dict[str, Any]]:
    """Learns a stream, reloads its pool in another process; returns the pool and what was found."""
    with open_session(settings, job="benchmark families", progress=Terminal()) as session:
        learned = learn_stream(session)
        with session.progress.working("the same prompts, here and from the registry in another process"):
            same = _reloaded(session, learned)
    return learned.pool, {
        "experts": learned.pool.names,
        "learning_seconds": learned.summary["seconds_total"],
        "routing_accuracy": learned.summary["continual"]["routing_accuracy"],
        **same,
    }


def _reloaded(session: StreamSession, learned: LearnResult) -> dict[str, Any]:
    """Compares what this process and another one, which has the pool from the registry, answer."""
    rows, folder = _prompts(session), session.folder / "reloaded"
    base = load_base(session.config.base)
    routed = RoutedModel(base.model, learned.pool)
    here, chosen = routed_logits(routed, base.processor, rows)
    with routed.forced(None):
        bare, _ = routed_logits(routed, base.processor, rows)
    write_json(folder / "prompts.json", rows)
    model = f"models:/{session.pool_model}/latest"
    started = monotonic()
    command = [sys.executable, "-m", "jobs.benchmark.tools.reload_pool", mlflow.get_tracking_uri(), model]
    subprocess.run([*command, str(folder / "prompts.json"), str(folder)], check=True)
    seconds = monotonic() - started
    there, answers = load_file(folder / "logits.safetensors"), json.loads((folder / "answers.json").read_text())
    own_code = not Path(answers["code"]).is_relative_to(Path(str(pipeline.__file__)).parent)
    apart, effect = _largest(here, there), _largest(here, bare)
    equal = answers["expert"] == chosen
    return {
        "reload_seconds": seconds,
        "prompts": len(rows),
        "logit_difference": apart,
        "effect_of_experts": effect,
        "decisions": chosen,
        "decisions_equal": equal,
        "code_from_registry": own_code,
        "proven": apart <= TOLERANCE < effect and equal and own_code,
    }


def _largest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max((one[key] - other[key]).abs().max().item() for key in one)


def _prompts(session: StreamSession) -> list[dict[str, str | None]]:
    """Returns the first prompts of every task and family, as rows for a pool's `predict`."""
    rows: list[dict[str, str | None]] = []
    for task in session.data.eval_tasks.values():
        for record in first_records(task.eval, session.data.demo_folder, task.prompt, PROMPTS):
            image = None
            if record.images:
                stream = io.BytesIO()
                record.images[0].save(stream, format="PNG")
                image = base64.b64encode(stream.getvalue()).decode()
            rows.append({"prompt": record.question, "image": image})
    return rows


def difference(one: Pool, other: Pool) -> dict[str, float]:
    """Returns the largest difference between the LoRA weights of two pools' experts, and the largest weight."""
    apart, size = 0.0, 0.0
    for name, expert in one.experts.items():
        for path, adapter in expert.adapters.items():
            twin = other.experts[name].adapters[path]
            for a, b in ((adapter.a_RD, twin.a_RD), (adapter.b_OR, twin.b_OR)):
                apart, size = max(apart, (a - b).abs().max().item()), max(size, a.abs().max().item())
    return {"weight_difference": apart, "largest_weight": size}


def _show(terminal: Terminal, proofs: Mapping[str, Mapping[str, Any]]) -> None:
    rows = []
    for name, proof in proofs.items():
        weights = f"{proof['weight_difference']:.1e}" if "weight_difference" in proof else ""
        equal = "equal" if proof["decisions_equal"] else "DIFFER"
        apart, effect = f"{proof['logit_difference']:.1e}", f"{proof['effect_of_experts']:.1e}"
        rows.append([name, f"{proof['learning_seconds']:.0f}", apart, effect, equal, weights])
    header = ["family", "learn s", "logits", "effect", "choices", "weights"]
    terminal.console.print(table("Families: learned, registered, reloaded in another process", header, rows))
    terminal.log(
        "logits: largest difference between the processes; effect: what the experts change in them; weights: largest "
        "difference of the experts from those that learned without kept image features"
    )
