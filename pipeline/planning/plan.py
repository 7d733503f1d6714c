"""The plan of a stream: memory of one GPU at every moment of a step, operations, hours, disk.

Memory is planned for the longest row that `data.max_tokens` allows, since one such batch is enough to fail. Time is planned
for the typical row, whose tiles and text are assumptions.
"""

from dataclasses import dataclass
from functools import cached_property

from pipeline.config import LearnConfig
from pipeline.data.loading.batch_loader import StepLayout
from pipeline.planning.activations import Activations, Kernel, Pass, activations
from pipeline.planning.architecture import PROJECTOR, VISION, Architecture
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.compute import (
    Operations,
    answering_seconds,
    gathering_seconds,
    operations,
    vision_operations,
)
from pipeline.planning.gpus import Gpu
from pipeline.planning.sizes import Sizes, sizes
from pipeline.planning.states import States, states
from pipeline.training.zero import zero_config

CONTEXT = 1.0e9
"""Bytes that CUDA's context, its libraries' workspaces and NCCL take before the first tensor; an allowance, it
differs by driver and GPU."""

FRAGMENTATION = 0.08
"""Share of the tensors' bytes that the caching allocator holds unused; an allowance."""

TILES = 12
"""Most tiles per image of InternVL's processor, unless `base.max_tiles` is less; a thumbnail comes on top."""


@dataclass(frozen=True)
class Row:
    """A row's length."""

    tokens: int
    tiles: int
    answer_tokens: int
    """Answer tokens among `tokens`."""


@dataclass(frozen=True)
class Plan:
    """Memory, time and disk of learning a stream."""

    config: LearnConfig
    architecture: Architecture
    gpu: Gpu | None
    """None on CPUs."""
    capacity: float
    """Bytes that a worker may use."""
    assumptions: Assumptions

    # Rows and batches

    @property
    def share(self) -> int:
        """Most rows of a step per worker."""
        return -(-self.config.expert.batch_size // self.config.training.workers)

    @property
    def layout(self) -> StepLayout:
        """Division of a step's rows, as in training."""
        training = self.config.training
        micro_batch = min(training.micro_batch or self.share, self.share)
        return StepLayout(self.config.expert.batch_size, training.workers, micro_batch)

    @property
    def micro_batch(self) -> int:
        """Most rows per pass."""
        return -(-self.layout.batch_size // (self.layout.workers * self.layout.accumulation))

    @property
    def accumulated(self) -> int:
        """Passes per step."""
        return self.layout.accumulation

    @property
    def rows_per_step(self) -> int:
        """Rows per step, over all workers."""
        return self.config.expert.batch_size

    @property
    def cached_vision(self) -> bool:
        """Whether image embeddings are read from disk and the vision tower is not loaded."""
        return self.config.data.vision_cache == "features"

    @property
    def typical(self) -> Row:
        """The row that time is planned for."""
        tokens = self.assumptions.tiles * self.architecture.tile_tokens + self.assumptions.text_tokens
        tiles = self.assumptions.tiles if self.architecture.tower else 0
        return Row(min(tokens, self.longest.tokens), tiles, self.assumptions.answer_tokens)

    @property
    def longest(self) -> Row:
        """The longest row that `data.max_tokens` allows."""
        tokens, tiles = min(self.config.data.max_tokens, self.architecture.longest), 0
        if self.architecture.tower is not None:
            tiles = min((self.config.base.max_tiles or TILES) + 1, tokens // self.architecture.tile_tokens)
        return Row(tokens, tiles, max(self.assumptions.answer_tokens, self.assumptions.longest_answer))

    # Memory

    @property
    def bytes(self) -> int:
        """Bytes of a frozen weight and of an activation."""
        return 2 if self.config.training.precision == "bf16" or self.config.base.dtype == "bfloat16" else 4

    @property
    def adapter_bytes(self) -> int:
        """Bytes of an adapter's weight."""
        return 2 if self.config.training.precision == "bf16" else 4

    @property
    def kernel(self) -> Kernel:
        """Attention kernel: rows of a micro-batch differ in length, so more than one means padding."""
        attention = self.config.base.attention
        if attention == "eager":
            return "eager"
        return "masked" if attention == "sdpa" and self.micro_batch > 1 else "flash"

    @property
    def loaded(self) -> int:
        """Parameters of the base that a worker loads."""
        left_out = (VISION, PROJECTOR) if self.cached_vision else ()
        return sum(count for part, count in self.architecture.parameters.items() if part not in left_out)

    @cached_property
    def states(self) -> States:
        """Memory that does not depend on the batch."""
        config = self.config
        zero = zero_config(
            config.training,
            micro_batch=self.micro_batch,
            accumulated=self.accumulated,
            max_grad_norm=config.expert.max_grad_norm,
        )
        return states(
            base=self.loaded,
            adapter=self.architecture.adapter_parameters(config.expert.rank),
            training=config.training,
            weight_bytes=self.bytes,
            adapter_bytes=self.adapter_bytes,
            zero=zero["zero_optimization"],
            gpu=self.gpu is not None,
        )

    @property
    def cpu(self) -> dict[str, int]:
        """Bytes of CPU memory per worker: offloaded states, and the base while it loads (ZeRO-3 shards it at once)."""
        size = 2 if self.config.base.dtype == "bfloat16" else 4
        loading = size * self.architecture.total
        loads_whole = self.gpu is not None and self.config.training.zero_stage != 3
        return ({"the base while it loads": loading} if loads_whole else {}) | dict(self.states.cpu)

    def step(self, row: Row) -> Pass:
        """Returns the pass of a micro-batch of such rows."""
        return Pass(
            rows=self.micro_batch,
            tokens=row.tokens,
            answer_tokens=min(row.answer_tokens, row.tokens),
            tiles=0 if self.cached_vision else self.micro_batch * row.tiles,
            rank=self.config.expert.rank,
            kernel=self.kernel,
            dropout=self.config.expert.dropout > 0,
            checkpointing=self.config.training.gradient_checkpointing,
            bytes=self.bytes,
            adapter_bytes=self.adapter_bytes,
            gpu=self.gpu is not None,
        )

    def moments(self, row: Row) -> dict[str, dict[str, int]]:
        """Returns bytes per worker by moment and part, for a micro-batch of such rows.

        Moments: the vision tower runs; logits and loss; the final norm, the last and the first layer run backward; the
        optimizer steps. The allowance for the allocator and CUDA is a separate part; CPUs have none.
        """
        activation_bytes, layers = activations(self.architecture, self.step(row)), self.architecture.decoder.layers
        by_moment = moments_of(activation_bytes, self.states, layers=layers, accumulating=self.accumulated > 1)
        moments = {name: self._always(row) | parts for name, parts in by_moment.items()}
        if self.gpu is not None:
            for parts in moments.values():
                parts["CUDA and allocator (allowance)"] = int(CONTEXT + FRAGMENTATION * sum(parts.values()))
        return moments

    def _always(self, row: Row) -> dict[str, int]:
        states = self.states
        tower = self.architecture.tower
        images = 0
        if tower is not None:
            embeds = self.architecture.tile_tokens * self.architecture.decoder.width * self.bytes
            images = self.micro_batch * row.tiles * (embeds if self.cached_vision else 4 * tower.pixels)
        return {
            "frozen weights": states.weights,
            "frozen weights, gathered": states.gathered,
            "adapter": states.adapter,
            "optimizer states": states.optimizer,
            "buffers between workers": states.bucket if states.bucket_stays else 0,
            "batch": images + 24 * self.micro_batch * row.tokens,
        }

    def peak(self, row: Row) -> tuple[str, int]:
        """Returns the moment of the peak, and its bytes."""
        totals = {name: sum(parts.values()) for name, parts in self.moments(row).items()}
        name = max(totals, key=totals.__getitem__)
        return name, totals[name]

    @property
    def fits(self) -> bool:
        """Whether the longest row fits."""
        return self.peak(self.longest)[1] <= self.capacity

    # Time

    @property
    def operations(self) -> Operations:
        """Operations of a typical row."""
        return operations(
            self.architecture,
            tokens=self.typical.tokens,
            answer_tokens=self.typical.answer_tokens,
            tiles=0 if self.cached_vision else self.typical.tiles,
            rank=self.config.expert.rank,
            kernel=self.kernel,
            checkpointing=self.config.training.gradient_checkpointing,
        )

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step: computing, or gathering weights where that takes longer; None on CPUs."""
        if self.gpu is None:
            return None
        rows = self.share  # the worker with most of them decides
        computing = rows * self.operations.total / (self.gpu.operations * self.assumptions.utilisation)
        return max(computing, self.gathering_seconds)

    @property
    def gathering_seconds(self) -> float:
        """Seconds of a step in which ZeRO-3 gathers weights; 0 otherwise."""
        training = self.config.training
        if self.gpu is None or training.zero_stage < 3 or training.workers == 1:
            return 0.0
        passes = 3 if training.gradient_checkpointing else 2
        weights = self.bytes * self.loaded
        return self.accumulated * gathering_seconds(weights, training.workers, self.gpu, passes=passes)

    @property
    def caching_seconds(self) -> float | None:
        """Seconds in which one GPU computes the image embeddings of a typical row; None without cache."""
        if self.gpu is None or not self.cached_vision:
            return None
        return vision_operations(self.architecture, self.typical.tiles) / (
            self.gpu.operations * self.assumptions.utilisation
        )

    @property
    def expert_seconds(self) -> float | None:
        """Seconds of the expert stage of one task."""
        return None if self.step_seconds is None else self.config.expert.steps * self.step_seconds

    @property
    def router_seconds(self) -> float | None:
        """Seconds of the router stage of one task; its steps cost as much as the expert stage's."""
        return None if self.step_seconds is None else self.config.router.steps * self.step_seconds

    @property
    def evaluated_tasks(self) -> int:
        """Evaluations of a task or benchmark over the stream: all by the base, then each task by its expert.

        With the token router answers depend on the whole pool: each evaluated pool answers all tasks so far.
        """
        new, old = len(self.config.stream.tasks), len(self.config.stream.benchmarks)
        if self.config.router.kind != "token":
            return new + old + new
        return new + old + sum(task + old for task in range(1, new + 1) if self.config.is_evaluated(task))

    @property
    def evaluation_seconds(self) -> float | None:
        """Seconds of one GPU for all evaluations of the stream."""
        if self.gpu is None:
            return None
        evaluation = self.config.evaluation
        return answering_seconds(
            self.architecture,
            prompts=self.evaluated_tasks * (evaluation.limit or self.assumptions.prompts),
            tokens=self.typical.tokens,
            tiles=0 if self.cached_vision else self.typical.tiles,
            new=evaluation.max_new_tokens,
            batch=evaluation.batch_size,
            weights=(2 if self.config.base.dtype == "bfloat16" else 4) * self.loaded,
            gpu=self.gpu,
            use=self.assumptions.utilisation,
        )

    @property
    def gpu_seconds(self) -> float | None:
        """GPU-seconds of the whole stream: both stages of all tasks on all workers, and evaluations."""
        if self.expert_seconds is None or self.router_seconds is None or self.evaluation_seconds is None:
            return None
        training = (self.expert_seconds + self.router_seconds) * self.config.training.workers
        return len(self.config.stream.tasks) * training + self.evaluation_seconds

    @property
    def parallel_tasks(self) -> int:
        """Tasks that are trained in parallel; one where the cluster decides."""
        setting = self.config.training.parallel_tasks
        return 1 if isinstance(setting, str) else min(setting, len(self.config.stream.tasks))

    @property
    def clock_seconds(self) -> float | None:
        """Seconds from the first to the last step of the stream, `parallel_tasks` in parallel."""
        if self.expert_seconds is None or self.router_seconds is None:
            return None
        turns = -(-len(self.config.stream.tasks) // self.parallel_tasks)
        return turns * (self.expert_seconds + self.router_seconds)

    # Disk

    @property
    def sizes(self) -> Sizes:
        """Sizes on disk."""
        return sizes(
            self.architecture,
            rank=self.config.expert.rank,
            wanted_width=self.config.router.feature_width,
            null_components=self.config.router.null_components,
            adapter_bytes=self.adapter_bytes,
            feature_bytes=(2 if self.config.base.dtype == "bfloat16" else 4) if self.cached_vision else 0,
            tiles=self.typical.tiles,
        )


def moments_of(saved: Activations, states: States, *, layers: int, accumulating: bool) -> dict[str, dict[str, int]]:
    """Returns the parts on top of constant memory, by moment.

    The backward pass frees saved tensors and fills in gradients, so memory peaks at one of its ends. Where micro-batches
    accumulate, gradients exist from the start.
    """
    gradients = {"gradients": states.gradients}
    before = gradients if accumulating else {}
    early = gradients if accumulating else {"gradients": states.gradients // layers}
    layer = {
        "buffers between workers": states.bucket,
        "one layer again": saved.recomputed,
        "gradients of activations": saved.backward,
    }
    vision = {"vision tower": before | {"vision tower's activations": saved.vision}} if saved.vision else {}
    return vision | {
        "logits and loss": before | {"activations": saved.kept, "logits and loss": saved.logits},
        "final norm backward": before | {"activations": saved.kept, "gradients of activations": saved.final_norm},
        "last layer backward": early | {"activations": saved.kept_last} | layer,
        "first layer backward": gradients | {"activations": saved.kept_first} | layer,
        "optimizer": gradients | {"optimizer's temporaries": states.step},
    }
