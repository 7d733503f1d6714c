"""What is read of the base prompts: logits at last tokens only, results whatever the batches and workers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.local import connect
from pipeline.config import BaseModelConfig
from pipeline.data.encoded.packing import pack
from pipeline.models.bases import Base
from pipeline.models.inference import InferenceWorkers
from pipeline.training.null_expert import FEATURES, StatisticsCollector, null_statistics
from tests.helpers import prompts
from tests.models.test_inference import WORKERS, counted_logits

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def packed(tiny_base: Base) -> list[dict[str, bytes]]:
    rows = prompts(tiny_base.processor, "describe", 6) + prompts(tiny_base.processor, "repeat", 6)
    return [pack(row) for row in rows]


def columns(packed: list[dict[str, bytes]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in packed], object) for name in packed[0]}


def collector(folder: Path, workers: InferenceWorkers) -> StatisticsCollector:
    return StatisticsCollector(BaseModelConfig(path=str(folder)), workers, None, "auto", vision=True)


def test_logits_are_computed_at_last_tokens_only(tiny_folder: Path, packed: list[dict[str, bytes]]) -> None:
    """Over all tokens they are the largest tensor of a job: 20 GB for 64 prompts of 1,700 tokens."""
    collect = collector(tiny_folder, WORKERS)
    with counted_logits(collect.base.model) as seen:
        collect(columns(packed))
    assert sum(seen) <= len(packed)


def test_results_do_not_depend_on_batches(tiny_folder: Path, packed: list[dict[str, bytes]]) -> None:
    whole, parts = (collector(tiny_folder, replace(WORKERS, tokens_per_batch=n))(columns(packed)) for n in (10_000, 80))
    assert whole.keys() == parts.keys()
    for key in whole:
        np.testing.assert_allclose(whole[key], parts[key], rtol=1e-3, atol=1e-4)
    assert len(whole[FEATURES]) == len(packed)


def test_all_workers_read_and_results_keep_their_order(tiny_folder: Path, packed: list[dict[str, bytes]]) -> None:
    connect()
    rows = ray.data.from_items(packed)

    def read(workers: InferenceWorkers) -> tuple[np.ndarray, np.ndarray]:
        (features,), layer_statistics = null_statistics(
            rows,
            BaseModelConfig(path=str(tiny_folder)),
            wanted_width=None,
            null_components=1,
            targets="auto",
            workers=workers,
        )
        return features.mean_F.numpy(), next(iter(layer_statistics.values())).mean_F.numpy()

    one, two = read(WORKERS), read(replace(WORKERS, count=2, batch_size=4))
    for expected, actual in zip(one, two, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)
