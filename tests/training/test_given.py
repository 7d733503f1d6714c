"""Training with an adapter that was trained elsewhere, under real Ray and DeepSpeed, on the untrained tiny base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cluster.deepspeed_ops import build_deepspeed_ops
from cluster.local import connect
from pipeline.config import BaseModelConfig, DataConfig, ExpertConfig, RouterConfig, SourceConfig, TrainingConfig
from pipeline.data.loading.preprocess import TaskRows, prepare
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.models.bases import Base
from pipeline.models.target_modules import base_linears
from pipeline.routing import Expert, Pool
from pipeline.routing.adapters import ADAPTER_WEIGHTS
from pipeline.routing.foreign import ForeignAdapter, foreign_adapter
from pipeline.routing.peft_folder import write_peft_folder
from pipeline.training.given import give, given_folder
from pipeline.training.session import TrainingError, run_training
from pipeline.training.spec import GivenAdapter, TrainSpec
from tests.helpers import attached, batch_of, make_expert, prompts

pytestmark = pytest.mark.ray

ROWS = 40


@pytest.fixture(scope="module")
def worker_env() -> dict[str, str]:
    connect()
    return build_deepspeed_ops()


@pytest.fixture(scope="module")
def rows(worker_env: dict[str, str], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingRows:
    folder = tmp_path_factory.mktemp("rows")
    prepared = prepare(
        {"digits": TaskRows(SourceConfig(path="demo://digits/train", limit=ROWS))},
        DataConfig(),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=folder,
        quarantine=folder,
        answer=True,
    )
    return prepared.training_rows(["digits"])


@pytest.fixture(scope="module")
def theirs(tiny_base: Base, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ForeignAdapter:
    """An adapter of another rank than the task's, from a folder that the workers never see."""
    folder = tmp_path_factory.mktemp("elsewhere") / "sums"
    write_peft_folder(folder, make_expert(tiny_base, "sums", rank=6, seed=4).adapters, base_name="theirs")
    read = foreign_adapter(folder, base_linears(BaseModelConfig(path=str(tiny_folder))))
    shutil.rmtree(folder)
    return read


def spec_of(tiny_folder: Path, given: GivenAdapter | None, training: TrainingConfig, **more: Any) -> TrainSpec:
    return TrainSpec(
        task="digits",
        digest="given",
        identity={"seed": 3},
        data_fingerprint="data",
        seed=3,
        base=BaseModelConfig(path=str(tiny_folder)),
        expert=ExpertConfig(rank=4, steps=12, batch_size=16),
        router=RouterConfig(steps=5),
        training=training,
        adapter=given,
        **more,
    )


@pytest.mark.parametrize(
    "training",
    [
        TrainingConfig(cpus_per_worker=1),
        TrainingConfig(cpus_per_worker=1, workers=2, zero_stage=3, zero_persistence_threshold=0),
        TrainingConfig(cpus_per_worker=1, workers=2, zero_stage=2, precision="bf16"),
    ],
    ids=["one", "zero3", "bf16"],
)
def test_the_expert_has_the_given_weights_and_a_router_of_its_own(
    training: TrainingConfig,
    theirs: ForeignAdapter,
    rows: TrainingRows,
    worker_env: dict[str, str],
    tiny_base: Base,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    seen: list[Any] = []
    given = give(theirs, tmp_path)
    spec = spec_of(tiny_folder, given, training)
    result = run_training(spec, rows, storage=tmp_path, on_steps=seen.extend, worker_env=worker_env)
    expert = Expert.load(result.expert)
    assert {step.stage for step in seen} == {"router"}
    assert expert.adapters.keys() == theirs.adapters.keys() == expert.vectors.keys()
    for path, adapter in theirs.adapters.items():
        assert expert.adapters[path].a_RD.equal(adapter.a_RD)
        assert expert.adapters[path].b_OR.equal(adapter.b_OR)
        assert expert.adapters[path].scaling == adapter.scaling == 2.0
    assert all(vector.any() for vector in expert.vectors.values()), "every gate has moved"
    assert expert.statistics.count == ROWS
    card = expert.card
    assert (card.rank, card.alpha, card.samples) == (6, 12.0, 0)
    assert card.identity == {"seed": 3, "adapter": theirs.content}
    assert card.trained_with["adapter"] == "sums (base theirs)"
    assert result.metrics["expert_seconds"] == 0 < result.metrics["router_seconds"]
    pool = Pool("tiny", tiny_base.fingerprint, RouterConfig(), [expert])
    batch = batch_of(tiny_base, prompts(tiny_base.processor, "describe", 2))
    with torch.inference_mode():
        alone = tiny_base.model(**batch, use_cache=False).logits
        with attached(tiny_base, pool) as routed, routed.forced("digits"):
            assert not torch.allclose(tiny_base.model(**batch, use_cache=False).logits, alone), "and it answers"


def test_what_does_not_arrive_whole_is_an_error_with_a_remedy(
    theirs: ForeignAdapter, rows: TrainingRows, worker_env: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    given = give(theirs, tmp_path)
    assert give(theirs, tmp_path) == given, "twice is once"
    file = given_folder(given, tmp_path) / ADAPTER_WEIGHTS
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(
        TrainingError, match=r"does not hold the adapter that was given; remove the folder, and give it again"
    ):
        run_training(
            spec_of(tiny_folder, given, TrainingConfig(cpus_per_worker=1)),
            rows,
            storage=tmp_path,
            worker_env=worker_env,
        )


def test_a_given_adapter_is_not_trained_further(theirs: ForeignAdapter, tiny_folder: Path, tmp_path: Path) -> None:
    given = give(theirs, tmp_path)
    for more in ({"start": "/elsewhere"}, {"router_stage": False}):
        with pytest.raises(ValidationError, match="is not trained further, and has a router stage"):
            spec_of(tiny_folder, given, TrainingConfig(), **more)
