"""Proves that what is exported and registered works where this project is not: in new environments, made for that alone.

    pointsman benchmark fresh-environment

Two tasks are learned on the demo's base, one with images and one without. Then:

- an environment with torch, transformers, peft and pillow loads the base and each exported expert, and answers
  (`tools/stock_peft.py`); answers and logits are compared with those of the same expert here.
- an environment with the requirements that the registered pool names loads it (`tools/served_pool.py`), and serves it with
  `mlflow models serve`; answers are compared with those here, accuracies with the registered ones.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import mlflow
import requests
import torch
import typer
from mlflow.entities.model_registry import ModelVersion

from jobs.benchmark.tools import environments, served_pool, stock_peft
from jobs.endings import user_errors
from jobs.terminal import Terminal, table
from pipeline.config import LearnConfig
from pipeline.data.rows.records import Record
from pipeline.data.sources.reader import first_records
from pipeline.evaluation.metrics import METRICS
from pipeline.files import write_json
from pipeline.learning.learn import learn_stream
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.models.bases import load_base
from pipeline.models.encoding import collate_for, encode
from pipeline.provenance import now, provenance
from pipeline.registry.bases import base_folder
from pipeline.registry.exports import ExportFormat, prepare_export
from pipeline.registry.scores import scores_of
from pipeline.registry.usage import PROCESSOR
from pipeline.registry.versions import MODELS, get_version, logged_model_id
from pipeline.routing import Pool, RoutedModel
from pipeline.routing.store import CACHE_VARIABLE

TASKS = ("digits", "successor")
"""Tasks of the demo: one with images, one without."""
QUESTIONS = 40
"""Evaluation prompts per task."""
TOLERANCE = 1e-4
"""Largest difference of two logits that counts as none: stock PEFT adds up in another order."""
STOCK = ("torch", "transformers", "peft", "safetensors", "pillow")
"""Packages that using an exported expert takes, at the versions that are here."""


@dataclass(frozen=True)
class Prompt:
    """An evaluation prompt, and what answered it."""

    task: str
    record: Record
    expert: str = ""
    answer: str = ""
    alone: str = ""
    """Answer of its task's expert, whatever the router says."""
    logits: tuple[float, ...] = ()
    """Those of that answer's first token."""

    @property
    def row(self) -> dict[str, str | None]:
        """The row of a pool's `predict`."""
        image = None
        if self.record.images:
            stream = io.BytesIO()
            self.record.images[0].save(stream, format="PNG")
            image = base64.b64encode(stream.getvalue()).decode()
        return {"prompt": self.record.question, "image": image}


def fresh_environment(
    steps: Annotated[int, typer.Option(help="Steps of the expert stage.", min=1)] = 150,
    torchvision: Annotated[
        bool, typer.Option("--torchvision", help="Install it too: stock AutoProcessor takes it for this base.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for runs, registry, environments and summary.")] = Path(
        "runs/benchmark-fresh-environment"
    ),
) -> None:
    """Load what is exported and registered in environments without this project, and compare the answers."""
    with user_errors():
        folder, terminal, started = output.resolve(), Terminal(), now()
        with open_session(_stream(folder, steps), job="benchmark fresh-environment", progress=terminal) as session:
            pool = learn_stream(session).pool
            version = get_version(session.pool_model, "latest")
            prompts = _answered(session, pool)
            uri = mlflow.get_tracking_uri()
            results = {
                "stock_peft": _stock(terminal, version, prompts, folder, torchvision=torchvision),
                **_required(terminal, version, prompts, folder, uri),
            }
        proven = all(result["proven"] for result in results.values())
        summary = provenance("benchmark-fresh-environment", started) | {"proven": proven, "environments": results}
        write_json(folder / "summary.json", summary)
        _show(terminal, results)
        terminal.log(f"summary    {folder / 'summary.json'}")
    if not proven:
        raise typer.Exit(1)


def _stream(output: Path, steps: int) -> LearnConfig:
    tasks = [
        {"name": name, "train": f"demo://{name}/train", "eval": {"path": f"demo://{name}/eval", "limit": QUESTIONS}}
        for name in TASKS
    ]
    return LearnConfig.model_validate(
        {
            "name": "fresh",
            "output": str(output),
            "base": {"path": "tiny"},
            "stream": {"tasks": tasks, "base_prompts": {"path": "demo://general/train", "limit": 300}},
            "expert": {"rank": 8, "steps": steps, "batch_size": 32, "learning_rate": 2e-3},
            "router": {"steps": 10},
            "training": {"cpus_per_worker": 1},
            "evaluation": {"max_new_tokens": stock_peft.TOKENS},
        }
    )


@torch.inference_mode()
def _answered(session: StreamSession, pool: Pool) -> list[Prompt]:
    """Answers the evaluation prompts here, one by one: with the pool, and with the task's expert alone."""
    base = load_base(session.config.base)
    routed, answered = RoutedModel(base.model, pool), []
    for task in session.config.stream.tasks:
        for record in first_records(task.eval, session.data.demo_folder, task.prompt, QUESTIONS):
            encoded = encode(base.processor, record.messages, record.images, answer=False)
            batch = collate_for(base.processor, [encoded], "left")
            del batch["labels"]

            def generate(batch: Mapping[str, Any] = batch) -> tuple[str, torch.Tensor]:
                found = base.model.generate(
                    **batch, max_new_tokens=stock_peft.TOKENS, do_sample=False, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
                new = found.sequences[:, batch["input_ids"].shape[1] :]
                return base.processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip(), found.logits[0][
                    0
                ]

            with routed.call() as call:
                answer, _ = generate()
            with routed.forced(task.name):
                alone, logits = generate()
            expert = call.decisions[0].expert or "base"
            answered.append(Prompt(task.name, record, expert, answer, alone, tuple(logits.tolist())))
    return answered


def _stock(
    terminal: Terminal, version: ModelVersion, prompts: Sequence[Prompt], folder: Path, *, torchvision: bool
) -> dict[str, Any]:
    """Answers with exported experts in an environment of stock packages."""
    exported = prepare_export(version, ExportFormat.PEFT, folder / "scratch")
    exported.write(folder / "exported")
    base = base_folder(logged_model_id(exported.base))
    with terminal.working("an environment with stock PEFT"):
        requirements = [f"{package}=={installed(package).partition('+')[0]}" for package in STOCK]
        made = environments.new_environment(
            folder / "env-stock", [*requirements, *["torchvision"] * torchvision], folder / "env-stock.log"
        )
    apart, equal, importable, processors = 0.0, 0, False, set()
    for task in TASKS:
        asked = [prompt for prompt in prompts if prompt.task == task]
        found = _run(
            made, stock_peft.__file__, asked, folder / f"stock-{task}",
            [str(base), str(folder / "exported" / task), str(folder / "exported" / PROCESSOR)],
        )  # fmt: skip
        importable |= found["project_importable"]
        processors.add(found["processor"])
        equal += sum(p.alone == answer for p, answer in zip(asked, found["answers"], strict=True))
        for prompt, logits in zip(asked, found["logits"], strict=True):
            apart = max(apart, max(abs(a - b) for a, b in zip(prompt.logits, logits, strict=True)))
    return {
        "environment_seconds": made.seconds,
        "processor": ", ".join(sorted(processors)),
        "prompts": len(prompts),
        "answers_equal": equal,
        "logit_difference": apart,
        "project_importable": importable,
        "proven": equal == len(prompts) and apart <= TOLERANCE and not importable,
    }


def _required(
    terminal: Terminal, version: ModelVersion, prompts: Sequence[Prompt], folder: Path, uri: str
) -> dict[str, dict[str, Any]]:
    """Answers with the registered pool, loaded and served in an environment of its own requirements."""
    model = f"{MODELS}{version.name}/{version.version}"
    named = Path(mlflow.pyfunc.get_model_dependencies(model))
    with terminal.working("an environment with what the pool requires"):
        made = environments.new_environment(folder / "env-pool", ["-r", str(named)], folder / "env-pool.log")
    variables = {"MLFLOW_TRACKING_URI": uri, CACHE_VARIABLE: str(folder / "env-pool-experts")}
    loaded = _run(made, served_pool.__file__, prompts, folder / "loaded", [uri, model], variables)
    with (
        terminal.working("mlflow models serve"),
        made.serving(model, folder / "serve.log", variables) as address,
    ):
        asked = {"dataframe_records": [p.row for p in prompts], "params": {"max_new_tokens": stock_peft.TOKENS}}
        response = requests.post(f"{address}/invocations", json=asked, timeout=600)
        response.raise_for_status()
    served = response.json()["predictions"]
    columns = {name: [row[name] for row in served] for name in ("answer", "expert")}
    registered = {score.dataset: score.accuracy for score in scores_of(version)}
    importable = loaded["project_importable"]
    return {
        name: _compared(found, prompts, registered)
        | {"environment_seconds": made.seconds, "project_importable": importable}
        for name, found in {"load_model": loaded, "models_serve": columns}.items()
    }


def _compared(found: Mapping[str, Any], prompts: Sequence[Prompt], registered: Mapping[str, float]) -> dict[str, Any]:
    """Compares answers, experts and accuracies with those here and in the registry."""
    answers, experts = list(found["answer"]), list(found["expert"])
    accuracy = {
        task: fmean(
            METRICS["exact_match"](answer, prompt.record.reference)
            for prompt, answer in zip(prompts, answers, strict=True)
            if prompt.task == task
        )
        for task in TASKS
    }
    equal = sum(prompt.answer == answer for prompt, answer in zip(prompts, answers, strict=True))
    chosen = sum(prompt.expert == expert for prompt, expert in zip(prompts, experts, strict=True))
    as_registered = all(abs(accuracy[task] - registered[task]) < 1e-9 for task in TASKS)
    return {
        "prompts": len(prompts),
        "answers_equal": equal,
        "experts_equal": chosen,
        "accuracy": accuracy,
        "registered_accuracy": {task: registered[task] for task in TASKS},
        "proven": equal == chosen == len(prompts) and as_registered and not found.get("project_importable", False),
    }


def _run(
    made: environments.Environment,
    script: str | None,
    prompts: Sequence[Prompt],
    folder: Path,
    arguments: Sequence[str],
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a script of `tools` on prompts in an environment; returns what it found."""
    assert script is not None, "a module of this project"
    write_json(folder / "prompts.json", [prompt.row for prompt in prompts])
    files = [str(folder / "prompts.json"), str(folder / "answers.json")]
    made.run(["python", script, *arguments, *files], folder / "log", variables)
    return dict(json.loads((folder / "answers.json").read_text()))


def _show(terminal: Terminal, results: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        [
            name,
            f"{result['environment_seconds']:.0f}",
            f"{result['answers_equal']} of {result['prompts']}",
            " ".join(f"{accuracy:.3f}" for accuracy in result.get("accuracy", {}).values()),
            " ".join(f"{accuracy:.3f}" for accuracy in result.get("registered_accuracy", {}).values()),
            "yes" if result["proven"] else "NO",
        ]
        for name, result in results.items()
    ]
    header = ["environment", "made in s", "answers equal", f"accuracy ({', '.join(TASKS)})", "registered", "proven"]
    terminal.show(table("Without this project", header, rows))
