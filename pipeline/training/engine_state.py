"""What a DeepSpeed engine has learned, whole: trained weights in fp32 and AdamW's moments, by the names of the parameters.

Each rank holds fragments of them, cut up differently by every ZeRO stage and number of ranks. Whole, they can be handed to an
engine of another stage, number of ranks or precision, which then goes on where the first one stood.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.training.zero import gathered

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


class _Fragment(NamedTuple):
    """The part of a parameter whose master copy a rank holds: values `start` to `start + length` of the flat parameter."""

    start: int
    length: int
    master: Tensor
    """Tensor that the optimizer steps, and has the moments of."""
    offset: int
    """Where in the flat master the fragment begins."""

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the fragment (length,) of the master or of one of its moments, as a view."""
        return tensor.view(-1).narrow(0, self.offset, self.length)


def gathered_state(engine: Any) -> dict[str, Tensor]:
    """Returns weights and moments by `<parameter>.<weight or moment>`, each of its parameter's shape, on the CPU.

    All ranks must call it, after a step at least; rank 0 gets the state, the others nothing.
    """
    moments, state = engine.basic_optimizer.state, {}
    shared = engine.zero_optimization_stage() > 0 and dist.get_world_size() > 1
    for name, parameter, fragment in _fragments(engine):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        for key in (WEIGHT, *MOMENTS):
            tensor = torch.zeros(shape, dtype=torch.float32, device=engine.device)
            if fragment is not None:
                part = fragment.master if key == WEIGHT else moments[fragment.master][key]
                tensor.view(-1).narrow(0, fragment.start, fragment.length).copy_(fragment.of(part.detach()))
            if shared:  # the others' fragments; each value is held by one rank, so that nothing is rounded
                dist.all_reduce(tensor)
            if dist.get_rank() == 0:
                state[f"{name}.{key}"] = tensor.cpu()
    return state


def put_state(engine: Any, state: Mapping[str, Tensor], step: int) -> None:
    """Makes an engine that has not stepped yet stand after optimizer step `step` with this state; all ranks call it."""
    optimizer, scheduler = engine.basic_optimizer, engine.lr_scheduler
    fragments = list(_fragments(engine))
    with torch.no_grad():
        for master in _masters(engine):
            zeros = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
            optimizer.state[master] = {"step": torch.tensor(float(step)), **zeros}
        for name, _, fragment in fragments:
            if fragment is None:
                continue
            for key in (WEIGHT, *MOMENTS):
                part = fragment.master if key == WEIGHT else optimizer.state[fragment.master][key]
                tensor = state[f"{name}.{key}"].view(-1)
                fragment.of(part.detach()).copy_(tensor.narrow(0, fragment.start, fragment.length))
        with gathered([parameter for _, parameter, _ in fragments], changed=True):
            for name, parameter, _ in fragments:
                parameter.copy_(state[f"{name}.{WEIGHT}"])
    scheduler.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # the optimizer has: before
        scheduler.step()


def _fragments(engine: Any) -> Iterator[tuple[str, nn.Parameter, _Fragment | None]]:
    """Yields every trained parameter, and what this rank holds of it, None where that is nothing."""
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    masters = _masters(engine)
    for number, (name, parameter) in enumerate(trained):
        mapping = getattr(parameter, "_hp_mapping", None)
        fragment: _Fragment | None = None
        if engine.zero_optimization_stage() == 3:
            group, offset, share = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
            start = dist.get_rank() * share
            length = min(share, parameter.ds_numel - start)  # the last share is padded
            if length > 0:
                fragment = _Fragment(start, length, masters[group], offset)
        elif engine.zero_optimization_stage() > 0:
            if mapping is not None:
                low, address = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                fragment = _Fragment(low.start, low.numel, masters[mapping.param_group_index], address.start)
        else:
            fragment = _Fragment(0, parameter.numel(), masters[number], 0)
        yield name, parameter, fragment


def _masters(engine: Any) -> list[Tensor]:
    """Returns the tensors that the optimizer steps: one of many fragments under ZeRO, else one a parameter, in their order."""
    if engine.zero_optimization_stage() == 3:  # whose optimizer is handed them one by one, while it steps
        return engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in engine.basic_optimizer.param_groups for master in group["params"]]
