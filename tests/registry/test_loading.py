"""Pools read back from the registry: also those of releases that kept their experts in the pool."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import BaseModelConfig
from pipeline.registry.experts import register_expert
from pipeline.registry.loading import fetched_pool
from pipeline.registry.pools import register_pool
from pipeline.registry.retries import RegistryError
from pipeline.registry.successors import retire_expert
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import logged_model, version_at
from pipeline.routing import Expert, Pool
from tests.registry.conftest import LINEAR, MakeExpert

ADDRESS = "untrained.pool.demo/1"


@pytest.fixture
def holding(
    experiment: str, make_expert: MakeExpert, make_pool: Callable[..., Pool], tiny_folder: Path, tmp_path: Path
) -> Path:
    """The files of a registered pool that holds its one expert, as releases before references to experts wrote it."""
    base, expert = BaseModelConfig(path=str(tiny_folder), name="untrained"), make_expert("digits", "one")
    with tracked_run(experiment, "learn", "learn"):
        version = register_expert("untrained", expert.save(tmp_path / "expert"), card=expert.card, rows=10)
        register_pool(make_pool(expert), base, name="demo", digest="d", experts={"digits": version})
    artifacts = Path(logged_model(version_at(ADDRESS)).artifact_location.removeprefix("file://")) / "artifacts"
    shutil.rmtree(artifacts / "pool")
    folder = make_pool(expert).export(artifacts / "pool")
    card = json.loads((folder / "pool.json").read_text())
    for since in ("width", "null_digest", "store"):
        card.pop(since, None)
    (folder / "pool.json").write_text(json.dumps(card | {"format_version": 2, "experts": ["digits"]}))
    return folder


def test_experts_that_a_pool_holds_outlive_the_copy_that_was_fetched(holding: Path, make_expert: MakeExpert) -> None:
    expert: Expert = fetched_pool(ADDRESS).experts["digits"]
    assert expert.adapters[LINEAR].b_OR.equal(make_expert("digits", "one").adapters[LINEAR].b_OR)
    with pytest.raises(RegistryError, match=r"demo/1 holds digits itself, .*run its `pointsman learn` again"):
        retire_expert(version_at(ADDRESS), "digits")


def test_a_damaged_expert_names_the_pool_that_holds_it(holding: Path) -> None:
    (holding / "experts/digits/adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(
        RegistryError, match=r"^untrained\.pool\.demo/1 is damaged in its registry: experts/digits: adapter_model"
    ):
        fetched_pool(ADDRESS)
