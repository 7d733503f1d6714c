"""Pretrains a base for the demo on the procedural abilities and operations and writes it as a checkpoint folder.

    python -m jobs.pretrain_tiny --threads 1 --output base     # pipeline/models/operations_base, in 75 minutes

Stopped at any moment, the same command goes on. `pretraining.json` beside the weights records commands, examples, seconds
and the held-out score of every ability, and of every operation on written text and on pictures. `tiny_base` was made by an
earlier form of this command, of abilities alone: its own `pretraining.json` says how.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import InternVLForConditionalGeneration

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.pretraining import Sampler, batch_losses
from pipeline.config import ConfigError
from pipeline.data.demo.abilities import ABILITIES, BENCHMARKS, Example, vocabulary
from pipeline.data.demo.operations import MODALITIES, OPERATIONS, examples
from pipeline.files import atomic_file, write_json
from pipeline.models.encoding import IGNORED, IMAGE_PLACEHOLDER, Encoded, chat
from pipeline.models.generation import generate_answers
from pipeline.models.tiny import build_tiny, tiny_processor

RECORD = "pretraining.json"
"""What the base was made of, beside its weights: commands, examples, seconds, held-out scores."""

UNFINISHED = "unfinished.safetensors"
"""Weights, optimizer and sampler in the middle of a pretraining; gone at its end."""

READING = 0.2
"""Weight of the reading loss beside the answers'."""

PROMPTS = 500
"""Held-out prompts of every ability and operation, at the end; a fifth of them on the way."""

SAVED, SCORED = 100, 1500
"""Steps from one `UNFINISHED` to the next, and from one score to the next."""

EVALUATION_SEED = 1_000_003
"""Pretraining draws from `SeedSequence([seed, step])`; held-out examples from this seed and the ability's number."""

_PROMPT = "the prompt"


def encode_examples(processor: Any, examples: Sequence[Example], *, answer: bool = True) -> list[Encoded]:
    """Encodes examples in one tokenizer call (pretraining draws hundreds a second)."""
    image_tokens = (
        processor.start_image_token + processor.image_token * processor.image_seq_length + processor.end_image_token
    )
    user = {"role": "user", "content": _PROMPT}
    template = processor.apply_chat_template(chat([user]), add_generation_prompt=True, tokenize=False)
    prompts, answers = [], []
    pixels: list[dict[str, np.ndarray]] = []
    for example in examples:
        prompts.append(template.replace(_PROMPT, example.prompt.replace(IMAGE_PLACEHOLDER, image_tokens)))
        answers.append(example.answer + processor.tokenizer.eos_token)
        if example.image is None:
            pixels.append({})
        else:
            image = np.asarray(example.image, dtype=np.float32).transpose(2, 0, 1)
            pixels.append({"pixel_values": (image[None] / 255 - 0.5) / 0.5})
    prompt_ids = processor.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]
    rows = []
    for p, a, x in zip(prompt_ids, answer_ids, pixels, strict=True):
        ids = np.array(p + a if answer else p, dtype=np.int64)
        labels = ids.copy()
        labels[: len(p)] = IGNORED
        rows.append(Encoded(ids, labels, x))
    return rows


def score(model: Any, processor: Any, *, prompts: int) -> dict[str, float]:
    """Returns the exact match of greedy answers on `prompts` held-out questions of every ability and operation.

    Operations are scored by modality (`sort.text`, `sort.picture`), on the same sequences.
    """
    held_out = {}
    for number, name in enumerate(ABILITIES):
        random = np.random.default_rng([EVALUATION_SEED, number])
        held_out[name] = [ABILITIES[name](random) for _ in range(prompts)]
    for name in OPERATIONS:
        for modality in MODALITIES:
            held_out[f"{name}.{modality}"] = list(examples(name, modality, prompts, evaluation=True))
    model.eval()
    scores = {}
    for name, asked in held_out.items():
        rows = encode_examples(processor, asked, answer=False)
        answers = generate_answers(model, processor, rows, max_new_tokens=10)
        scores[name] = float(np.mean([a == e.answer for a, e in zip(answers, asked, strict=True)]))
    model.train()
    return scores


def show(scores: Mapping[str, float]) -> None:
    """Prints scores in one line."""
    print(" ".join(f"{name} {value:.2f}" for name, value in scores.items()), flush=True)


def learning_rate_factor(step: int, steps: int) -> float:
    """Returns the learning rate's factor: linear warm-up, constant, and over the last 30 % of all steps down to zero."""
    return min(1.0, (step + 1) / max(1, min(300, steps // 10)), (steps - step) / max(1.0, 0.3 * steps))


class Pretraining:
    """Model, optimizer and sampler, from step to step."""

    def __init__(self, model: Any, processor: Any, *, learning_rate: float) -> None:
        self.model, self.processor, self.sampler = model, processor, Sampler()
        self.step, self.seconds = 0, 0.0
        self.parameters = dict(model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        others = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
        self.learning_rate = learning_rate

    def advance(self, *, steps: int, batch_size: int, seed: int) -> tuple[float, float]:
        """Takes one of `steps`; returns the losses of answers and of reading."""
        started = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * learning_rate_factor(self.step, steps)
        asked, names = self.sampler.draw(np.random.default_rng([seed, self.step]), batch_size)
        losses = batch_losses(self.model, self.processor, encode_examples(self.processor, asked), asked)
        (losses.answers + READING * losses.reading).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sampler.update(names, losses.by_row)
        self.step += 1
        self.seconds += time.monotonic() - started
        return losses.answers.item(), losses.reading.item()

    def save(self, file: Path, command: str) -> None:
        """Writes everything that a later process needs to go on as if it had been this one."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}.{name}": self.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
        progress = {"command": command, "step": self.step, "seconds": self.seconds, "losses": self.sampler.losses}
        with atomic_file(file) as staging:
            save_file({k: t.contiguous() for k, t in tensors.items()}, staging, {"progress": json.dumps(progress)})

    def resume(self, file: Path, command: str) -> None:
        """Goes on where `save` was called; raises ConfigError where that was in another pretraining."""
        with safe_open(file, "pt") as saved, torch.no_grad():
            progress = json.loads(saved.metadata()["progress"])
            if progress["command"] != command:
                raise ConfigError(
                    f"{file} is of another pretraining, {progress['command']!r}: choose another --output, or remove it"
                )
            self.step, self.seconds = progress["step"], progress["seconds"]
            self.sampler = Sampler(progress["losses"])
            for name, p in self.parameters.items():
                p.copy_(saved.get_tensor(f"weight.{name}"))
                moments = {key: saved.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **moments}


Stop = Annotated[int | None, typer.Option(help="End after this many steps; the schedule keeps the length of --steps.")]
Start = Annotated[Path | None, typer.Option(help="Checkpoint folder to go on from, with a schedule of its own.")]


def main(
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write; may hold an unfinished one.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 13_000,
    batch_size: Annotated[int, typer.Option(help="Examples a step.", min=12)] = 96,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1.5e-3,
    layers: Annotated[int, typer.Option(help="Layers of the language model.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.", min=1)] = 2,
    start: Start = None,
    stop: Stop = None,
) -> None:
    """Pretrain a base for the demo on abilities and operations (tens of minutes on two cores)."""
    with user_errors():
        if start is not None and not (start / RECORD).is_file():
            raise ConfigError(f"--start {start}: holds no {RECORD}, so not a folder that this command wrote")
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        processor, history = tiny_processor(vocabulary()), []
        if start is None:
            model = build_tiny(processor, layers=layers)
        else:
            model = InternVLForConditionalGeneration.from_pretrained(start)
            history = json.loads((start / RECORD).read_text())["history"]
        model.train()
        command = f"python -m jobs.pretrain_tiny --steps {steps} --batch-size {batch_size} --seed {seed}"
        command += f" --learning-rate {learning_rate} --layers {layers} --threads {threads}"
        command += f" --start {start}" if start else ""
        run = Pretraining(model, processor, learning_rate=learning_rate)
        unfinished, end = output / UNFINISHED, stop or steps
        if unfinished.is_file():
            run.resume(unfinished, command)
        print(f"{model.num_parameters():,} parameters, vocabulary {len(processor.tokenizer)}, from step {run.step}")
        losses: list[tuple[float, float]] = []
        while run.step < end:
            losses.append(run.advance(steps=steps, batch_size=batch_size, seed=seed))
            if run.step % SAVED == 0:
                run.save(unfinished, command)
                answers, reading = np.mean(losses[-SAVED:], axis=0)
                left = run.seconds / run.step * (end - run.step) / 60
                print(
                    f"step {run.step}/{end}  answers {answers:.3f}  reading {reading:.3f}  {left:.0f} min left",
                    flush=True,
                )
            if run.step % SCORED == 0:
                show(score(model, processor, prompts=PROMPTS // 5))
        scores = score(model, processor, prompts=PROMPTS)
        show(scores)
        phase = {"command": command, "steps": end, "examples": end * batch_size, "seconds": round(run.seconds)}
        model.save_pretrained(output)
        processor.save_pretrained(output)
        record = {
            "parameters": model.num_parameters(),
            "scores": scores,
            "benchmark_mean": float(np.mean([scores[name] for name in BENCHMARKS])),
            "history": [*history, phase],
        }
        write_json(output / RECORD, record)
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    run_alone(main)
