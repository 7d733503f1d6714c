"""Measures how well a plan predicts memory: small InternVL models train on the CPU while every tensor is counted.

python -m jobs.benchmark plan

- Each case builds a base from a configuration and trains LoRA steps on it as the expert stage does, in plain PyTorch and PEFT;
  then a base without LoRA answers the same batch as evaluation does.
- Counted are the bytes of all storages from the operator that makes them until they are freed, what autograd keeps among
  them; the second step counts, when the optimizer's states are there.
- What the CPU cannot say about GPUs: its flash kernel keeps what CUDA's keeps, and so does the one for masks; but dropout
  keeps a mask in the activation's precision instead of one byte, and neither the caching allocator nor CUDA's context exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from jobs.benchmark.routing_cost import Allocations
from jobs.terminal import Terminal, table
from pipeline.config import ExpertConfig
from pipeline.files import write_json
from pipeline.models.bases import Base
from pipeline.models.encoding import IGNORED
from pipeline.models.families import family_of
from pipeline.planning.activations import Kernel, Pass, activations
from pipeline.planning.architecture import Architecture, architecture_of
from pipeline.planning.inference import Batch, inference_moments
from pipeline.planning.plan import moments_of
from pipeline.planning.states import States
from pipeline.provenance import now, provenance
from pipeline.training.lora import with_lora
from pipeline.training.loss import answer_loss, checkpoint_activations

PACKAGES = ("torch", "transformers", "peft")
IMAGE_TOKEN, PATCH = 3, 14
SHORTER = 24
"""Tokens by which the last of padded rows is shorter than the others."""


@dataclass(frozen=True)
class Case:
    """One model and batch."""

    name: str
    width: int = 128
    inner: int = 352
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    vocabulary: int = 2000
    rows: int = 2
    tokens: int = 256
    """Of every row, image tokens among them."""
    answer: int = 16
    """Tokens at the end of every row that are learned."""
    tiles: int = 2
    """Of every row."""
    side: int = 112
    """Pixels of a tile's side."""
    vision_width: int = 96
    vision_layers: int = 3
    rank: int = 8
    dropout: float = 0.0
    attention: Literal["sdpa", "eager"] = "sdpa"
    padded: bool = False
    """Whether rows differ in length."""
    targets: str = "auto"
    """Linears that are adapted; as `expert.target_modules`."""
    checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def kernel(self) -> Kernel:
        """How its attention is computed."""
        return "eager" if self.attention == "eager" else "masked" if self.padded else "flash"

    def configuration(self) -> InternVLConfig:
        """Returns the architecture."""
        vision = InternVLVisionConfig(
            hidden_size=self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=4,
            intermediate_size=4 * self.vision_width,
            image_size=self.side,
            patch_size=PATCH,
            attention_bias=True,
        )
        text = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=False,
        )
        return InternVLConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=(self.side // PATCH // 2) ** 2,
            tie_word_embeddings=False,
        )


UPPER_HALF = r".*language_model\.layers\.[23]\..*_proj"

SHIPPED: dict[str, Any] = {"rows": 1, "tokens": 1024, "rank": 4, "dropout": 0.05, "dtype": "bfloat16"}
AS_2B = SHIPPED | {"width": 256, "inner": 1024, "heads": 8, "key_value_heads": 4, "layers": 6}
AS_8B = SHIPPED | {"width": 256, "inner": 896, "heads": 8, "key_value_heads": 2, "layers": 8, "checkpointing": True}
"""As the configurations that ship train InternVL-2, at an eighth and a sixteenth of its widths."""

CASES = (
    Case("plain"),
    Case("checkpointing", checkpointing=True, layers=8),
    Case("eager", attention="eager"),
    Case("eager, checkpointing", attention="eager", checkpointing=True, layers=8),
    Case("padded", rows=4, padded=True),
    Case("padded, checkpointing", rows=4, padded=True, checkpointing=True, layers=8),
    Case("padded, eager", rows=4, padded=True, attention="eager"),
    Case("dropout", dropout=0.05),
    Case("dropout, checkpointing", dropout=0.05, checkpointing=True, layers=8),
    Case("bf16", dtype="bfloat16"),
    Case("bf16, checkpointing", dtype="bfloat16", checkpointing=True, layers=8),
    Case("bf16, eager", dtype="bfloat16", attention="eager"),
    Case("bf16, dropout, padded", dtype="bfloat16", dropout=0.05, rows=3, padded=True),
    Case("padded, dropout, checkpointing", padded=True, dropout=0.05, checkpointing=True),
    Case("one long row", rows=1, tokens=1024, tiles=6),
    Case("one long row, checkpointing, bf16", rows=1, tokens=1024, tiles=6, checkpointing=True, dtype="bfloat16"),
    Case("many short rows", rows=16, tokens=64, tiles=1),
    Case("wide", width=384, inner=1024, heads=6, key_value_heads=6, layers=3),
    Case("deep", layers=16, width=96, inner=256),
    Case("high rank", rank=64),
    Case("many tiles", tiles=8, tokens=160, layers=2, vision_width=192, vocabulary=200),
    Case("text only", tiles=0),
    Case("text only, checkpointing", tiles=0, checkpointing=True),
    Case("upper half adapted", targets=UPPER_HALF),
    Case("upper half adapted, checkpointing", targets=UPPER_HALF, checkpointing=True),
    Case("large vocabulary, short answers", vocabulary=20_000),
    Case(
        "large vocabulary, short answers, checkpointing, bf16", vocabulary=20_000, checkpointing=True, dtype="bfloat16"
    ),
    Case("long answers", answer=200),
    Case("long answers, eager", answer=200, attention="eager"),
    Case("long answers, padded, checkpointing", answer=200, rows=4, padded=True, checkpointing=True),
    Case("large vocabulary, long answers", vocabulary=20_000, answer=200, layers=2),
    Case("large vocabulary, long answers, bf16", vocabulary=20_000, answer=200, dtype="bfloat16"),
    Case(
        "large vocabulary, long answers, padded, checkpointing, bf16",
        vocabulary=20_000,
        answer=100,
        rows=3,
        padded=True,
        checkpointing=True,
        dtype="bfloat16",
    ),
    Case("as 2B, an eighth", **AS_2B, vocabulary=11_569, answer=64),
    Case("as 2B, an eighth, captions", **AS_2B, vocabulary=11_569, answer=512),
    Case("as 8B, a sixteenth", **AS_8B, vocabulary=5_784, answer=64),
    Case("as 8B, a sixteenth, two rows", **AS_8B | {"rows": 2, "padded": True}, vocabulary=5_784, answer=64),
)
QUICK = tuple(
    case for case in CASES if case.name in ("plain", "checkpointing", "eager", "bf16, checkpointing", "long answers")
)


@dataclass(frozen=True)
class Comparison:
    """Bytes as predicted and as measured."""

    case: str
    part: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted - self.measured) / self.measured


ANSWERS = "answers"
"""The part that decides whether evaluation fits: all tensors beyond the frozen weights while prompts are read and answered."""

NEW_TOKENS = 4
"""Tokens of an answer."""

PEAK = "peak"
"""The part that decides whether training fits: all tensors beyond the frozen weights at the worst moment."""


def measure(cases: Sequence[Case] = CASES) -> list[Comparison]:
    """Returns every case's parts, predicted and measured.

    Parts: frozen weights; optimizer states; what forward keeps for backward; the vision tower while it runs; `ANSWERS`; and
    `PEAK`.
    """
    return [comparison for case in cases for comparison in compare(case)]


def compare(case: Case) -> list[Comparison]:
    """Returns one case's parts."""
    values = measured(case) | {ANSWERS: measured_answers(case)}
    expected = predicted(case) | {ANSWERS: predicted_answers(case)}
    return [Comparison(case.name, part, expected[part], values[part]) for part in values]


def predicted(case: Case) -> dict[str, int]:
    """Returns what the plan's formulas say, by part."""
    architecture = architecture_of(case.configuration(), case.targets)
    step = Pass(
        rows=case.rows,
        tokens=case.tokens,
        answer_tokens=case.answer,
        tiles=case.rows * case.tiles,
        rank=case.rank,
        kernel=case.kernel,
        dropout=case.dropout > 0,
        checkpointing=case.checkpointing,
        bytes=4 if case.dtype == "float32" else 2,
        adapter_bytes=4 if case.dtype == "float32" else 2,
        gpu=False,
    )
    usage = activations(architecture, step)
    states = _plain_states(architecture, case.rank, step.bytes)
    moments = moments_of(usage, states, layers=case.layers, accumulating=False)
    peak = states.adapter + states.optimizer + max(sum(parts.values()) for parts in moments.values())
    kept = usage.kept + 4 * step.learned * case.vocabulary  # between the passes the log-softmax is there, too
    parts = {"frozen weights": states.weights, "optimizer states": states.optimizer, "kept for backward": kept}
    if case.tiles:
        parts["vision tower"] = usage.vision
    return parts | {PEAK: peak}


def predicted_answers(case: Case) -> int:
    """Returns what the plan's formulas say of answering a case's batch with the bare base; the batch itself is not counted."""
    batch = Batch(
        rows=case.rows,
        tokens=case.tokens,
        new=NEW_TOKENS,
        tiles=case.rows * case.tiles,
        kernel=case.kernel,
        bytes=4 if case.dtype == "float32" else 2,
    )
    moments = inference_moments(architecture_of(case.configuration()), batch)
    return max(sum(size for part, size in parts.items() if part != "batch") for parts in moments.values())


def measured_answers(case: Case) -> int:
    """Answers a case's batch and returns the most bytes at any time."""
    torch.manual_seed(0)
    configuration = case.configuration()
    configuration._attn_implementation = case.attention
    model = InternVLForConditionalGeneration(configuration).to(getattr(torch, case.dtype)).eval()
    batch = _batch(case, configuration)
    del batch["labels"]
    batch["attention_mask"] = batch["attention_mask"].flip(1)  # padded on the left
    with torch.inference_mode(), Allocations() as seen:
        model.generate(**batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return seen.peak


def _plain_states(architecture: Architecture, rank: int, size: int) -> States:
    """Returns what plain PyTorch holds: AdamW's moments in the weights' precision, no buffers, no shards."""
    adapter = size * architecture.adapter_parameters(rank)
    return States(
        weights=size * architecture.total,
        gathered=0,
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        bucket=0,
        bucket_stays=False,
        step=0,
        cpu={},
    )


def build(case: Case) -> tuple[Any, dict[str, Tensor]]:
    """Returns a case's PEFT model as the expert stage makes it, ready to train, and its batch."""
    torch.manual_seed(0)
    configuration = case.configuration()
    configuration._attn_implementation = case.attention
    model = InternVLForConditionalGeneration(configuration).to(getattr(torch, case.dtype))
    model.requires_grad_(False)
    base = Base(model, None, family_of(configuration), "", case.name, Path())
    peft = with_lora(base, ExpertConfig(rank=case.rank, dropout=case.dropout, target_modules=case.targets))
    if case.checkpointing:
        checkpoint_activations(base)
    if case.dtype == "bfloat16":
        peft = peft.to(torch.bfloat16)
    return peft.train(), _batch(case, configuration)


def measured(case: Case) -> dict[str, int]:
    """Trains two steps and returns what the second one took, by part."""
    model, batch = build(case)
    parts = measured_parts(model, batch)
    if case.tiles:
        with Allocations() as seen:
            inner = model.get_base_model().model
            inner.get_image_features(batch["pixel_values"], vision_feature_layer=-1, return_dict=True)
        parts["vision tower"] = seen.peak
    return parts


def measured_parts(model: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """Trains a model two steps and returns what the second one took, by part."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights, adapter = (sum(p.nbytes for p in model.parameters() if p.requires_grad is on) for on in (False, True))
    optimizer = torch.optim.AdamW(trained)
    with Allocations() as seen:
        _step(model, optimizer, trained, batch, seen)
        states = seen.live
        kept, peak = _step(model, optimizer, trained, batch, seen)
    return {
        "frozen weights": weights,
        "optimizer states": states,
        "kept for backward": kept - states,
        PEAK: peak + adapter,
    }


def _step(
    model: Any, optimizer: torch.optim.Optimizer, trained: list[Any], batch: dict[str, Tensor], seen: Any
) -> tuple[int, int]:
    """Runs one optimizer step; returns the bytes alive between forward and backward, and the most at any time."""
    seen.peak = seen.live
    loss = answer_loss(model, batch)
    kept = seen.live
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, ExpertConfig().max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return kept, seen.peak


def _batch(case: Case, configuration: InternVLConfig) -> dict[str, Tensor]:
    ids = torch.randint(IMAGE_TOKEN + 1, case.vocabulary, (case.rows, case.tokens))
    ids[:, : case.tiles * configuration.image_seq_length] = IMAGE_TOKEN
    labels, mask = torch.full_like(ids, IGNORED), torch.ones_like(ids)
    for row in range(case.rows):
        end = case.tokens - (SHORTER if case.padded and row == case.rows - 1 else 0)
        labels[row, end - case.answer : end] = ids[row, end - case.answer : end]
        mask[row, end:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if case.tiles:
        batch["pixel_values"] = torch.rand(case.rows * case.tiles, 3, case.side, case.side)
    return batch


def plan(
    quick: Annotated[bool, typer.Option("--quick", help=f"{len(QUICK)} cases instead of {len(CASES)}.")] = False,
    threads: Annotated[
        int, typer.Option(help="Threads of PyTorch; models this small only wait for a second.", min=1)
    ] = 1,
    output: Annotated[Path, typer.Option(help="Folder of summary.json.")] = Path("runs/benchmark-plan"),
) -> None:
    """How well a plan predicts memory: small models train on the CPU while every tensor is counted."""
    started, terminal = now(), Terminal()
    torch.set_num_threads(threads)
    with terminal.working("training small models"):
        comparisons = measure(QUICK if quick else CASES)
    parts = list(dict.fromkeys(c.part for c in comparisons))
    worst = {part: max(c.error for c in comparisons if c.part == part) for part in parts}
    summary = {
        **provenance("benchmark plan", started, seed=0, packages=PACKAGES),
        "plan": {"max_relative_error": worst[PEAK], "max_relative_error_by_part": worst},
        "cases": [
            {
                "case": c.case,
                "part": c.part,
                "predicted_bytes": c.predicted,
                "measured_bytes": c.measured,
                "error": c.error,
            }
            for c in comparisons
        ],
    }
    file = output / "summary.json"
    write_json(file, summary)
    cases = dict.fromkeys(c.case for c in comparisons)
    values = {(c.case, c.part): c for c in comparisons}
    rows = []
    for case in cases:
        peak = values[case, PEAK]
        errors = [f"{values[case, part].error:.1%}" if (case, part) in values else "-" for part in parts]
        rows.append([case, f"{peak.measured / 1e6:.1f}", f"{peak.predicted / 1e6:.1f}", *errors])
    rows.append(["worst", "", "", *(f"{worst[part]:.1%}" for part in parts)])
    header = ["case", "MB measured", "planned", *parts]
    terminal.console.print(table("Peak beyond the frozen weights, and relative errors by part", header, rows))
    terminal.log(f"summary    {file}")
