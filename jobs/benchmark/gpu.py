"""What a GPU really takes: a job of one task on a random base of InternVL-2 2B's shape, measured beside its plan.

    pointsman benchmark gpu

- The real path: Ray, DeepSpeed, bf16, cached image features, both stages, evaluation. Only the weights are random, so
  accuracies say nothing.
- Memory is what the device reports as taken, sampled through each moment, beyond what was taken before the first; on a CPU it
  is that of all processes, where a plan counts tensors only.
- `--size tiny --device cpu` runs the same code without a GPU, in a minute.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from time import monotonic
from typing import Annotated, Any, Literal

import torch
import typer
from peft import PeftModel
from transformers import InternVLForConditionalGeneration

from cluster.usage import memory_bytes
from jobs.endings import user_errors
from jobs.terminal import Terminal, table
from pipeline.config import BaseModelConfig, ConfigError, LearnConfig
from pipeline.data.demo.abilities import vocabulary
from pipeline.data.encoded.packing import unpack
from pipeline.data.loading.preprocess import PreparedData
from pipeline.evaluation.predictor import Predictor
from pipeline.files import write_json
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.models.encoding import IGNORED, Encoded
from pipeline.models.generation import generate_answers
from pipeline.models.tiny import build_tiny, tiny_processor
from pipeline.planning.architecture import architecture_of, base_configuration
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.job import EXPERT_STAGE, ROUTER_STAGE, job_moments
from pipeline.planning.summary import make_plan
from pipeline.provenance import now, provenance
from pipeline.routing.expert import Expert
from pipeline.routing.pool import Pool

SHAPE = Path(__file__).parents[1] / "configs" / "bases" / "internvl2_2b"
TILES = 4
"""Tiles of an image, without the thumbnail: rows of some 1,300 tokens."""
TASK = "digits"
TRAINING = "both stages"
WARM_UP = 3
"""Steps at the start that do not count."""

Size = Literal["2b", "tiny"]
Device = Literal["cuda", "cpu"]


@dataclass
class Meter:
    """Peak memory and seconds by moment."""

    bytes_in_use: Callable[[], int]
    """Returns the bytes that are taken now."""
    every: float = 0.1
    peaks: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = self.bytes_in_use()

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        """Samples memory while the context lasts."""
        stop, began = threading.Event(), monotonic()
        self.peaks[moment] = 0

        def watch() -> None:
            while not stop.wait(self.every):
                self.peaks[moment] = max(self.peaks[moment], self.bytes_in_use() - self._before)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.seconds[moment] = monotonic() - began


def gpu(
    size: Annotated[Size, typer.Option(help="Shape of the random base.")] = "2b",
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "cuda",
    steps: Annotated[int, typer.Option(help="Steps of the expert stage.", min=2)] = 40,
    output: Annotated[Path, typer.Option(help="Folder of summary.json, report.md and the base.")] = Path(
        "runs/benchmark-gpu"
    ),
) -> None:
    """Measure one GPU: memory of every moment against the plan, tokens per second, routed against a single LoRA."""
    terminal = Terminal()
    if device == "cuda" and not torch.cuda.is_available():
        terminal.log("skipped: PyTorch finds no GPU here; the same code without one: --size tiny --device cpu")
        return
    with user_errors():
        if size == "2b" and device == "cpu":
            raise ConfigError("--size 2b --device cpu: takes hours on a CPU; give --size tiny")
        output = output.resolve()
        with terminal.working("writing a random base (once)"):
            base = write_base(size, output / f"base-{size}")
        config = configuration(base, size=size, device=device, steps=steps, output=output)
        summary = {
            **provenance("benchmark gpu", now(), seed=config.seed),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "size": size,
        }
        with open_session(config, job="benchmark gpu", progress=Terminal()) as session:
            summary |= measure(session, device)
    write_json(output / "summary.json", summary)
    (output / "report.md").write_text(page(summary))
    rows = moment_rows(summary)
    terminal.console.print(table("Memory by moment", ["moment", "GB measured", "planned", "ratio", "seconds"], rows))
    terminal.log(f"{summary['tokens_per_second']:.0f} tokens per second in training; routed answers take "
                 f"{summary['routed_ratio']:.2f} of a single LoRA's time")  # fmt: skip
    terminal.log(f"report     {output / 'report.md'}")
    terminal.log(f"summary    {output / 'summary.json'}")


def write_base(size: Size, folder: Path) -> Path:
    """Writes a random base with its processor, unless it is there, and returns its folder."""
    if (folder / "processor_config.json").exists():
        return folder
    processor = tiny_processor(vocabulary())
    torch.manual_seed(0)
    if size == "tiny":
        model = build_tiny(processor)
    else:
        processor.image_seq_length = 256
        images = processor.image_processor
        images.size = {"height": 448, "width": 448}
        images.crop_to_patches, images.min_patches, images.max_patches = True, TILES, TILES
        shape = base_configuration(BaseModelConfig(path=str(SHAPE)))
        shape.image_token_id = processor.image_token_id
        shape.text_config.eos_token_id = processor.tokenizer.eos_token_id
        shape.text_config.pad_token_id = processor.tokenizer.pad_token_id
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = InternVLForConditionalGeneration(shape)
        finally:
            torch.set_default_dtype(torch.float32)
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def configuration(base: Path, *, size: Size, device: Device, steps: int, output: Path) -> LearnConfig:
    """Returns the job: one task, base prompts, cached image features; bf16 on GPUs."""
    cuda, rows = device == "cuda", 256 if size == "2b" else 16

    def source(name: str, count: int) -> dict[str, Any]:
        return {"path": f"demo://{name}", "limit": count}

    return LearnConfig.model_validate(
        {
            "name": "job",
            "output": str(output),
            "base": {"path": str(base), "dtype": "bfloat16" if cuda else "float32"},
            "stream": {
                "tasks": [{"name": TASK, "train": source("digits/train", rows), "eval": source("digits/eval", rows)}],
                "base_prompts": source("general/train", rows),
            },
            "data": {"vision_cache": "features", "max_tokens": 4096},
            "expert": {"rank": 16, "steps": steps, "batch_size": 16 if cuda else 4, "learning_rate": 1e-3},
            "router": {"steps": max(2, steps // 4)},
            "training": {
                "gpu": cuda,
                "precision": "bf16" if cuda else "fp32",
                "micro_batch": 2,
                "cpus_per_worker": 4 if cuda else 1,
            },
            "evaluation": {"batch_size": 16 if cuda else 8, "max_new_tokens": 32 if cuda else 4},
        }
    )


def measure(session: StreamSession, device: Device) -> dict[str, Any]:
    """Runs the job moment by moment; returns the summary's metrics."""
    task, meter = session.config.stream.tasks[0], Meter(_bytes_in_use(device), every=0.1 if device == "cuda" else 0.5)
    with meter.during("image features"):
        prompts = session.data.prompts([TASK])
        _ = session.data.base_prompts
        rows = session.data.training_rows(task)
    with meter.during("base prompts"):
        null = session.null_expert()
    with meter.during(TRAINING):
        # A name of its own: a finished run of the same name would only be read again.
        trained = session.train(*session.spec(task, f"gpu-{now():%Y%m%d%H%M%S}"))
        session.end_sessions()  # its base is not part of the moments after it
    expert = Expert.load(trained.expert)
    pool = Pool(session.config.base.label, session.fingerprint, session.config.router, **null).add(expert)
    folder = pool.save(session.folder / "pool")
    with meter.during("evaluation"):
        session.evaluate([task.name], pool, f"gpu-{now():%Y%m%d%H%M%S}", folder=folder)
    packed = list(rows.rows([task.name]).iter_batches(batch_size=None, batch_format="numpy"))
    lengths = [(len(row.input_ids), int((row.labels != IGNORED).sum())) for batch in packed for row in unpack(batch)]
    step = median(trained.metrics["expert_step_seconds"][WARM_UP:] or trained.metrics["expert_step_seconds"])
    return {
        "moments": _against_plan(session, meter, lengths),
        "row_tokens": fmean(tokens for tokens, _ in lengths),
        "step_seconds": step,
        "tokens_per_second": session.config.expert.batch_size * fmean(tokens for tokens, _ in lengths) / step,
        **_answering(session, prompts, pool, trained.expert),
    }


def _bytes_in_use(device: Device) -> Callable[[], int]:
    def on_gpu() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    return on_gpu if device == "cuda" else memory_bytes


def _against_plan(session: StreamSession, meter: Meter, lengths: list[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Returns measured and planned bytes by moment; the plan's longest row is the job's."""
    longest, answer = (max(values) for values in zip(*lengths, strict=True))
    data = session.config.data.model_copy(update={"max_tokens": longest})
    config = session.config.model_copy(update={"data": data})
    assumptions = Assumptions(tiles=TILES + 1, text_tokens=longest, answer_tokens=answer, longest_answer=answer)
    architecture = architecture_of(base_configuration(config.base))
    planned: dict[str, int] = {}
    for moment in job_moments(make_plan(config, architecture, assumptions=assumptions)):
        name = TRAINING if moment.name in (EXPERT_STAGE, ROUTER_STAGE) else moment.name
        planned[name] = max(planned.get(name, 0), moment.bytes)
    return {
        name: {
            "measured_bytes": peak,
            "planned_bytes": planned[name],
            "ratio": peak / planned[name],
            "seconds": meter.seconds[name],
        }
        for name, peak in meter.peaks.items()
    }


def _answering(session: StreamSession, prompts: PreparedData, pool: Pool, expert: Path) -> dict[str, float]:
    """Returns seconds of answering the task's prompts with the pool and with its one LoRA in PEFT, and their ratio."""
    config, workers = session.config, session.capacity.inference
    tokens = config.evaluation.max_new_tokens
    batches = [
        unpack(batch)
        for batch in prompts.rows([TASK]).iter_batches(batch_size=workers.batch_size, batch_format="numpy")
    ]
    predictor = Predictor(config.base, workers, vision=session.data.vision)
    predictor.attach(pool)
    routed = _seconds(lambda rows: predictor.by_router(rows, tokens), batches)
    predictor.attach(None)
    peft = PeftModel.from_pretrained(predictor.base.model, expert)
    single = _seconds(
        lambda rows: generate_answers(
            peft, predictor.base.processor, rows, max_new_tokens=tokens, device=predictor.device
        ),
        batches,
    )
    return {"routed_seconds": routed, "single_lora_seconds": single, "routed_ratio": routed / single}


def _seconds(answer: Callable[[list[Encoded]], object], batches: list[list[Encoded]]) -> float:
    """Returns the seconds that all batches take; the first runs once before."""
    answer(batches[0])
    began = monotonic()
    for batch in batches:
        answer(batch)
    return monotonic() - began


def moment_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Returns the table of moments."""
    return [
        [name, *(f"{values[key] / 1e9:.2f}" for key in ("measured_bytes", "planned_bytes")), f"{values['ratio']:.2f}",
         f"{values['seconds']:.0f}"]
        for name, values in summary["moments"].items()
    ]  # fmt: skip


def page(summary: dict[str, Any]) -> str:
    """Returns the report in Markdown."""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in moment_rows(summary))
    return f"""# One job on {summary["device"]}

A random base ({summary["size"]}), one task, rows of {summary["row_tokens"]:.0f} tokens; {summary["started"]},
commit {summary["git_commit"]}. `{summary["command"]}`

| moment | GB measured | planned | ratio | seconds |
|---|---|---|---|---|
{rows}

Measured is what the device (on a CPU: all processes) took beyond what was taken before, loading included; planned is what
`pointsman plan` computes for rows of this length, allowances included.

- training: {summary["tokens_per_second"]:.0f} tokens per second, {summary["step_seconds"]:.3f} s a step
- answering the task's prompts: {summary["routed_seconds"]:.1f} s routed, {summary["single_lora_seconds"]:.1f} s with one LoRA
  in PEFT, ratio {summary["routed_ratio"]:.2f}
"""
