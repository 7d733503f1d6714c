"""Pretrains the demo's base on the procedural abilities and writes it as a checkpoint folder.

    python -m jobs.pretrain_tiny --steps 9000 --output pipeline/models/tiny_base

The shipped base was made by this command; `pretraining.json` beside its weights records configuration, seed, data, time
and the held-out score of every ability.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import InternVLForConditionalGeneration

from jobs.endings import user_errors
from jobs.lazy import run_alone
from pipeline.config import ConfigError
from pipeline.data.demo.abilities import ABILITIES, BENCHMARKS, Example, vocabulary
from pipeline.models.encoding import IGNORED, Encoded, chat, collate
from pipeline.models.generation import generate_answers
from pipeline.models.tiny import TINY_BASE, build_tiny, tiny_processor

RECORD = "pretraining.json"
"""What the base was made of, beside its weights: commands, examples, seconds, held-out scores."""

EVALUATION_SEED = 1_000_003
"""Pretraining draws from `SeedSequence([seed, step])`; held-out examples from this seed and the ability's number."""


def encode_examples(processor: Any, examples: Sequence[Example], *, answer: bool = True) -> list[Encoded]:
    """Encodes examples in one tokenizer call (pretraining draws hundreds a second)."""
    image_tokens = (
        processor.start_image_token + processor.image_token * processor.image_seq_length + processor.end_image_token
    )
    prompts, answers = [], []
    pixels: list[dict[str, np.ndarray]] = []
    for example in examples:
        user = {"role": "user", "content": ("<image>" if example.image else "") + example.question}
        prompt = processor.apply_chat_template(chat([user]), add_generation_prompt=True, tokenize=False)
        prompts.append(prompt.replace(processor.image_token, image_tokens))
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


def score_families(model: Any, processor: Any, *, prompts: int) -> dict[str, float]:
    """Returns the exact match of greedy answers on `prompts` held-out questions of every ability."""
    model.eval()
    scores = {}
    for number, (name, ability) in enumerate(ABILITIES.items()):
        random = np.random.default_rng([EVALUATION_SEED, number])
        examples = [ability(random) for _ in range(prompts)]
        rows = encode_examples(processor, examples, answer=False)
        answers = generate_answers(model, processor, rows, max_new_tokens=10)
        scores[name] = float(np.mean([a == e.answer for a, e in zip(answers, examples, strict=True)]))
    model.train()
    return scores


class AbilitySampler:
    """Draws abilities evenly, or those of `BENCHMARKS` in proportion to their running loss.

    The second lets what is learned make room for what is not.
    """

    FLOOR, MEMORY = 0.03, 0.98

    def __init__(self, *, even: bool) -> None:
        self.even = even
        self.losses = np.ones(len(ABILITIES))

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Returns the numbers of `count` abilities."""
        if self.even:
            return random.integers(len(ABILITIES), size=count)
        weights = np.where([name in BENCHMARKS for name in ABILITIES], self.FLOOR + self.losses, 0)
        return random.choice(len(self.losses), size=count, p=weights / weights.sum())

    def update(self, drawn: np.ndarray, losses: np.ndarray) -> None:
        """Takes in the mean loss a token of every drawn example."""
        for ability in np.unique(drawn):
            now = losses[drawn == ability].mean()
            self.losses[ability] = self.MEMORY * self.losses[ability] + (1 - self.MEMORY) * now


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of every row's answer tokens (B,), from logits (B, T, V) and labels (B, T)."""
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(1) / (targets != IGNORED).sum(1)


Sampling = Annotated[
    str, typer.Option(help="Draw all abilities `even`ly, or the benchmarks in proportion to their `loss`.")
]
Stop = Annotated[int | None, typer.Option(help="End after this many steps; the schedule keeps the length of --steps.")]
Start = Annotated[Path | None, typer.Option(help="Checkpoint folder to go on from, with a schedule of its own.")]


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 20_000,
    batch_size: Annotated[int, typer.Option(help="Examples a step.", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (AdamW, warm-up, cosine).")] = 1.5e-3,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.", min=1)] = 2,
    sampling: Sampling = "loss",
    start: Start = None,
    stop: Stop = None,
    output: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = TINY_BASE,
) -> None:
    """Pretrain the demo's base on its abilities (tens of minutes on two cores)."""
    with user_errors():
        if sampling not in ("even", "loss"):
            raise ConfigError(f"--sampling {sampling}: choose even or loss")
        if start is not None and not (start / RECORD).is_file():
            raise ConfigError(f"--start {start}: holds no {RECORD}, so not a folder that this command wrote")
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        history: list[dict[str, Any]] = []
        processor = tiny_processor(vocabulary())
        if start is None:
            model = build_tiny(processor)
        else:
            model = InternVLForConditionalGeneration.from_pretrained(start)
            history = json.loads((start / RECORD).read_text())["history"]
        model.train()
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, vocabulary {len(processor.tokenizer)}")
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        warm_up = max(1, min(500, steps // 10))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / warm_up, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, s / steps))))
        )
        abilities, sampler, losses = list(ABILITIES.values()), AbilitySampler(even=sampling == "even"), []
        started = time.monotonic()

        def write(step: int) -> None:
            scores = score_families(model, processor, prompts=500 if step in (steps, stop) else 100)
            mean = float(np.mean([scores[name] for name in BENCHMARKS]))
            print(" ".join(f"{name} {score:.2f}" for name, score in scores.items()), f"mean {mean:.3f}", flush=True)
            command = f"python -m jobs.pretrain_tiny --steps {steps} --batch-size {batch_size} --seed {seed}"
            command += f" --learning-rate {learning_rate} --threads {threads} --sampling {sampling}" + (
                f" --start {start}" if start else ""
            )
            phase = {
                "command": command,
                "steps": step,
                "examples": step * batch_size,
                "seconds": round(time.monotonic() - started),
            }
            record = {
                "parameters": parameters,
                "abilities": scores,
                "benchmark_mean": mean,
                "history": [*history, phase],
            }
            output.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(output)
            processor.save_pretrained(output)
            (output / RECORD).write_text(json.dumps(record, indent=2) + "\n")

        for step in range(stop or steps):
            random = np.random.default_rng([seed, step])
            drawn = sampler.draw(random, batch_size)
            examples = [abilities[i](random) for i in drawn]
            batch = collate(encode_examples(processor, examples), pad_token_id=processor.tokenizer.pad_token_id)
            output_ = model(**batch)
            loss = output_.loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            sampler.update(drawn, row_losses(output_.logits.detach(), batch["labels"]).numpy())
            losses.append(loss.item())
            done = step + 1
            if done % 100 == 0:
                pace = (time.monotonic() - started) / done
                left = pace * (steps - done) / 60
                line = f"step {done}/{steps}  loss {np.mean(losses[-100:]):.3f}  {pace * 1e3:.0f} ms a step"
                print(f"{line}  {left:.0f} min left", flush=True)
            if done % 1500 == 0 or done in (steps, stop):
                write(done)


if __name__ == "__main__":
    run_alone(main)
