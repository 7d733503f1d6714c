"""The expert stage against a plain PyTorch + PEFT loop, and what caching image features saves."""

from statistics import fmean, median
from time import perf_counter, time_ns
from typing import Annotated

import torch
import typer

from jobs.benchmark.tools.plain_loop import plain_steps, shuffled_batches
from jobs.endings import user_errors
from jobs.options import ConfigFile, Overrides, load
from jobs.terminal import Terminal, table
from pipeline.config import ConfigError, LearnConfig
from pipeline.data.encoded.packing import unpack
from pipeline.files import write_json
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.learning.summary import session_provenance
from pipeline.models.bases import load_base
from pipeline.provenance import now
from pipeline.training.lora import with_lora

WARM_UP = 10
"""Steps at the start that do not count: first kernels, first buffers."""

Rounds = Annotated[int, typer.Option(help="Rounds of plain loop and project, in turn; medians count.")]


def training(config: ConfigFile, overrides: Overrides = None, rounds: Rounds = 3) -> None:
    """Expert stage (DeepSpeed, Ray Train, Ray Data) against a plain PyTorch + PEFT loop: same data, batch, threads.

    Beside them the same stage with `data.vision_cache=features`: what it saves to run the frozen vision tower once.
    """
    with user_errors():
        settings = load(config, overrides)
        with open_session(settings, job="benchmark training", progress=Terminal()) as session:
            _training(session, rounds)


def _training(session: StreamSession, rounds: int) -> None:
    started = now()
    steps = session.config.expert.steps
    if steps <= WARM_UP:
        raise ConfigError(f"expert.steps={steps}: the first {WARM_UP} steps are start-up and do not count; take more")
    task = session.config.stream.tasks[0]
    rows = session.data.training_rows(task)
    cached = StreamSession(_with_features(session.config), session.cluster, session.progress, session.memory)
    cached.mlflow_run_id = session.mlflow_run_id
    with session.progress.working("computing image features"):
        began = perf_counter()
        cached.data.training_rows(task)
        feature_seconds = perf_counter() - began
    plain: list[float] = []
    ours: list[float] = []
    features: list[float] = []
    waits: list[float] = []
    for number in range(rounds):
        session.progress.log(f"round {number + 1}/{rounds}")
        with session.progress.working("plain PyTorch + PEFT loop"):
            plain.append(fmean(_plain_loop(session)[WARM_UP:]))
        for which, seconds in ((session, ours), (cached, features)):
            # A digest of its own: a finished run of the same name would only be read again.
            spec = which.spec(task, f"benchmark-{time_ns()}", task=f"benchmark_{task.name}", router_stage=False)
            metrics = which.train(*spec).metrics
            which.end_sessions()  # the plain loop is to have the machine alone
            seconds.append(fmean(metrics["expert_step_seconds"][WARM_UP:]))
            if which is session:
                waits.append(metrics["expert_wait_seconds"] / metrics["expert_seconds"])
    summary = session_provenance(session, started) | {
        "steps": steps,
        "batch_size": session.config.expert.batch_size,
        "rows": rows.counts[task.name],
        "warm_up_steps": WARM_UP,
        "plain_step_seconds": plain,
        "pointsman_step_seconds": ours,
        "throughput_ratio": median(plain) / median(ours),
        "data_wait_share": median(waits),
        "features_step_seconds": features,
        "features_speed_up": median(ours) / median(features),
        "features_seconds": feature_seconds,
    }
    file = session.folder / "benchmark-training.json"
    write_json(file, summary)
    header = ["expert stage", "ms a step (median)", "throughput", "waiting for data"]
    body = [
        ["plain PyTorch + PEFT", f"{1e3 * median(plain):.1f}", "1.00", "-"],
        [
            f"Ray + DeepSpeed ZeRO-{session.config.training.zero_stage}",
            f"{1e3 * median(ours):.1f}",
            f"{summary['throughput_ratio']:.2f}",
            f"{median(waits):.1%}",
        ],
        [
            "the same, vision_cache=features",
            f"{1e3 * median(features):.1f}",
            f"{median(plain) / median(features):.2f}",
            "-",
        ],
    ]
    session.progress.show(table(f"{steps} steps of {session.config.expert.batch_size} rows", header, body))
    session.progress.log(f"summary    {file}")


def _with_features(config: LearnConfig) -> LearnConfig:
    data_ = config.data.model_copy(update={"vision_cache": "features"})
    return config.model_copy(update={"data": data_})


def _plain_loop(session: StreamSession) -> list[float]:
    """Returns the seconds of each of the expert stage's steps in a plain loop, in this process, all rows in memory."""
    config = session.config
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.training.cpus_per_worker)
    base = load_base(config.base)
    task = config.stream.tasks[0]
    rows = [
        row
        for batch in session.data.training_rows(task).rows([task.name]).iter_batches(batch_format="numpy")
        for row in unpack(batch)
    ]
    batches = shuffled_batches(rows, config.expert.batch_size, pad_token_id=base.processor.tokenizer.pad_token_id)
    return plain_steps(with_lora(base, config.expert), config.expert, batches)
