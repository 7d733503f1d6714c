"""Memory at every moment of a job at which a GPU holds the base.

A job reads base prompts, computes image embeddings, trains both stages of each task and evaluates after it. All but training
is inference: by `evaluation.workers`, in batches of `evaluation.tokens_per_batch`, each on `evaluation.gpus_per_worker` GPUs.
Moments do not add up: a GPU belongs to one worker at a time, also where tasks are trained in parallel.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.models.inference import InferenceWorkers
from pipeline.models.placement import largest_share
from pipeline.planning.activations import Kernel
from pipeline.planning.architecture import HEAD, LANGUAGE, PROJECTOR, VISION
from pipeline.planning.inference import Batch, inference_moments, worst_batch_shapes
from pipeline.planning.plan import CONTEXT, FRAGMENTATION, Plan

EXPERT_STAGE, ROUTER_STAGE = "expert stage", "router stage"
SERVED = InferenceWorkers(batch_size=32)
"""Default batches of a served pool."""
SERVED_TOKENS = 64
"""Default new tokens per answer of a served pool."""


@dataclass(frozen=True)
class Moment:
    """A moment of a job, at its peak."""

    name: str
    when: str
    """Phase in which the peak occurs."""
    parts: Mapping[str, int]
    """Bytes per GPU (per worker on CPUs)."""
    gpus: int = 1
    """GPUs per base."""

    @property
    def bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


def job_moments(plan: Plan) -> list[Moment]:
    """Returns the moments of a job in their order.

    The expert stage is an upper bound for the router stage on the same base: gates save the inputs that a LoRA saves, and
    vectors are small. Before it prompt features are read; no layer runs for that.
    """
    evaluation = plan.config.evaluation
    workers = InferenceWorkers.of(plan.config.training, evaluation)
    tasks = len(plan.config.stream.tasks)
    moments = []
    if plan.config.stream.base_prompts is not None:
        moments.append(_inference(plan, "base prompts", workers))
    if plan.cached_vision:
        moments.append(_image_features(plan))
    when, _ = plan.peak(plan.longest)
    parts = plan.moments(plan.longest)[when]
    moments += [Moment(EXPERT_STAGE, when, parts), Moment(ROUTER_STAGE, f"at most: {when}", parts)]
    together = 1 if plan.config.router.kind == "prompt" else tasks  # a prompt router attaches one expert at a time
    moments.append(_inference(plan, "evaluation", workers, new=evaluation.max_new_tokens, experts=together))
    return moments


def served_pool(plan: Plan) -> Moment:
    """Returns the memory of MLflow serving the pool of all tasks, on a GPU like the job's, for prompts with images."""
    tasks = len(plan.config.stream.tasks)
    return _inference(plan, "served pool", SERVED, new=SERVED_TOKENS, experts=tasks, pixels=True)


def worst_moment(plan: Plan) -> Moment:
    """Returns the moment that needs most."""
    return max(job_moments(plan), key=lambda moment: moment.bytes)


def job_fits(plan: Plan) -> bool:
    """Whether every moment of a job fits."""
    return worst_moment(plan).bytes <= plan.capacity


def worst_inference(plan: Plan) -> Moment:
    """Returns the moment without training that needs most."""
    return max(
        (moment for moment in job_moments(plan) if moment.name not in (EXPERT_STAGE, ROUTER_STAGE)),
        key=lambda moment: moment.bytes,
    )


def _weight_bytes(plan: Plan) -> int:
    return 2 if plan.config.base.dtype == "bfloat16" else 4


def _weights(plan: Plan, gpus: int, *, vision: bool) -> int:
    """Returns the bytes of the base that the fullest of a worker's GPUs holds."""
    parameters, decoder = plan.architecture.parameters, plan.architecture.decoder
    first = parameters[LANGUAGE] - decoder.matrices + (parameters[VISION] + parameters[PROJECTOR] if vision else 0)
    layers = [decoder.matrices // decoder.layers] * decoder.layers
    return _weight_bytes(plan) * largest_share([first, *layers, parameters[HEAD]], gpus)


def _gpus(plan: Plan) -> int:
    return plan.config.evaluation.gpus_per_worker if plan.gpu is not None else 1


def _kernel(plan: Plan, rows: int) -> Kernel:
    attention = plan.config.base.attention
    if attention == "eager":
        return "eager"
    return "masked" if attention == "sdpa" and rows > 1 else "flash"


def _inference(
    plan: Plan, name: str, workers: InferenceWorkers, *, new: int = 0, experts: int = 0, pixels: bool = False
) -> Moment:
    """Returns the peak of an inference; `pixels`: rows hold tiles, whatever the job caches."""
    gpus, cached = _gpus(plan), plan.cached_vision and not pixels
    moments = []
    for rows, tokens in worst_batch_shapes(
        plan.longest.tokens, rows=workers.batch_size, tokens=workers.tokens_per_batch
    ):
        tile_tokens = plan.architecture.tile_tokens
        batch = Batch(
            rows=rows,
            tokens=tokens,
            new=new,
            tiles=rows * min(plan.longest.tiles, tokens // tile_tokens) if tile_tokens else 0,
            cached_vision=cached,
            kernel=_kernel(plan, rows),
            bytes=_weight_bytes(plan),
            routed=experts > 0,
            rank=plan.config.expert.rank if experts else 0,
        )
        moments += [
            (when, {part: size // gpus if part == "KV cache" else size for part, size in parts.items()})
            for when, parts in inference_moments(plan.architecture, batch).items()
        ]
    when, largest = max(moments, key=lambda moment: sum(moment[1].values()))
    parts = {
        "frozen weights": _weights(plan, gpus, vision=not cached),
        "experts": _expert_bytes(plan, experts) // gpus,
        **largest,
    }
    return _with_allowance(plan, Moment(name, when, parts, gpus))


def _expert_bytes(plan: Plan, experts: int) -> int:
    """Returns the bytes of experts on a worker's devices: all of them, or within `evaluation.expert_memory`."""
    adapter = plan.architecture.adapter_parameters(plan.config.expert.rank)
    all_experts = experts * (adapter + plan.architecture.vector_parameters) * _weight_bytes(plan)
    limit = plan.config.evaluation.expert_memory
    if limit is None or plan.config.router.kind == "token":
        return all_experts
    return min(all_experts, max(limit, adapter * _weight_bytes(plan)))


def _image_features(plan: Plan) -> Moment:
    """Returns the memory of caching image embeddings, row by row."""
    row, gpus = plan.longest, _gpus(plan)
    batch = Batch(1, row.tokens, tiles=row.tiles, kernel=_kernel(plan, 1), bytes=_weight_bytes(plan))
    parts = {"frozen weights": _weights(plan, gpus, vision=True)}
    parts |= inference_moments(plan.architecture, batch)["vision tower"]
    return _with_allowance(plan, Moment("image features", "vision tower", parts, gpus))


def _with_allowance(plan: Plan, moment: Moment) -> Moment:
    if plan.gpu is None:
        return moment
    allowance = {"CUDA and allocator (allowance)": int(CONTEXT + FRAGMENTATION * moment.bytes)}
    return Moment(moment.name, moment.when, {**moment.parts, **allowance}, moment.gpus)
