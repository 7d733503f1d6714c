"""DeepSpeed: the ZeRO configuration of a stage, and an engine around a model of which few parameters train."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.config import BaseModelConfig, TrainingConfig


def zero_config(
    training: TrainingConfig, *, micro_batch: int, accumulated: int = 1, max_grad_norm: float
) -> dict[str, Any]:
    """Returns the DeepSpeed configuration of one stage: `micro_batch` rows a worker, `accumulated` times a step."""
    # What is trained is small: DeepSpeed's own bucket of 5e8 values would take 1 GB beside an adapter of 0.1 GB.
    zero: dict[str, Any] = {"stage": training.zero_stage, "reduce_bucket_size": int(5e7)}
    if training.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.gpu}
    if training.zero_persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = training.zero_persistence_threshold
    if training.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": training.gpu}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        # The optimizer is torch's AdamW: DeepSpeed's own would compile another extension for a few small tensors.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def deepspeed() -> Any:
    """Returns the package, which takes seconds to import, and then has to know where it computes."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed as package

    return package


def start_engine(
    model: nn.Module, settings: dict[str, Any], *, learning_rate: float, weight_decay: float, schedule: Any
) -> Any:
    """Wraps a model into a DeepSpeed engine that trains the parameters which require gradients.

    `schedule` maps a step to a factor on the learning rate. The process group is the one Ray Train has made.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    engine, *_ = deepspeed().initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings, dist_init_required=False
    )
    return engine


def gathered(parameters: list[nn.Parameter], *, changed: bool = False) -> Any:
    """Context in which ZeRO-3's sharded parameters are whole on every rank; a no-op for others.

    With `changed` they may be changed in it; where ranks differ, rank 0's values count.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None)


@contextmanager
def sharded_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, makes `from_pretrained` shard weights while loading."""
    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(settings)  # transformers holds a weak reference to it
    yield
    del keep


def base_dtype(base: BaseModelConfig, training: TrainingConfig) -> BaseModelConfig:
    """Returns the base as it is trained on: in bfloat16 where either it or training is."""
    return base.model_copy(update={"dtype": "bfloat16"}) if training.precision == "bf16" else base


def close_engine(engine: Any) -> None:
    """Takes an engine's hooks off its model; what it held is free once its last name is gone, after `free_memory`."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    # What ZeRO-3 leaves behind keeps the engine with its buckets and optimizer alive: the model on a list and in a cache
    # without end inside a decorated method, the optimizer on every weight, and on every module backward functions, which the
    # next engine would even use instead of its own.
    cached: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in cached.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    parameter_offload.FWD_MODULE_STACK.clear()
    for module in engine.module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)
    for parameter in engine.module.parameters():
        parameter.__dict__.pop("_z3_optimizer", None)
