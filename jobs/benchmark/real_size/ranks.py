"""A few processes of one process group on this machine, without Ray: for what is measured of training itself."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from cluster.deepspeed_ops import build_deepspeed_ops

TIMEOUT = timedelta(minutes=2)
"""After which a rank that waits for another one fails."""


def run_ranks(function: Callable[..., Any], workers: int, *arguments: Any) -> list[Any]:
    """Returns what `function(*arguments)` returns in each of `workers` new processes, which form a gloo group."""
    environment = build_deepspeed_ops()
    with TemporaryDirectory() as folder, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        store = Path(folder) / "store"
        ranks = [pool.submit(_rank, function, rank, workers, store, environment, arguments) for rank in range(workers)]
        return [rank.result() for rank in ranks]


def _rank(
    function: Callable[..., Any],
    rank: int,
    workers: int,
    store: Path,
    environment: dict[str, str],
    arguments: tuple[Any, ...],
) -> Any:
    # DeepSpeed reads LOCAL_RANK; without it, it goes looking for MPI.
    os.environ.update(environment | {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(workers)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers, timeout=TIMEOUT)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
