"""A registry of an earlier release, as it was written then: one model of experts, one of pools, all that is known in tags."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from jobs.benchmark.tools.synthetic_experts import former_registry
from pipeline.config import AddConfig
from pipeline.learning.adding import stream_of
from pipeline.models.checkpoints import fingerprint
from pipeline.registry.experts import fetch_expert, find_expert
from pipeline.registry.migration import bases_to_migrate, check_names, migrate
from pipeline.registry.pools import find_pool
from pipeline.registry.promotion import champion, promote
from pipeline.registry.retries import RegistryError
from pipeline.registry.successors import base_of, open_pool
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import get_version, logged_model, versions_of
from pipeline.routing import Expert
from pipeline.routing.store import ExpertReference
from tests.registry.test_successors import POOL, extend, start

__all__ = ["extend", "start"]


@pytest.fixture
def former(experiment: str) -> None:
    """Two experts, one of them half made a second time, and the pools of the first and of both; the first is champion."""
    with tracked_run(experiment, "demo learn", "run") as run:
        former_registry(experiment, run, "tiny", "mine")


EXPERTS = {"digits": f"{1:012x}", "clock": f"{2:012x}"}


@pytest.mark.usefixtures("former")
def test_everything_finished_gets_its_new_name_and_stays_where_it_was(tmp_path: Path) -> None:
    assert bases_to_migrate() == bases_to_migrate("tiny") == ["tiny"]
    with pytest.raises(RegistryError, match="no experts of an earlier release for base 'other'; bases with some"):
        bases_to_migrate("other")
    message = r"tiny\.experts holds 2 versions of an earlier release: `pointsman registry migrate --registry sqlite:///"
    with pytest.raises(RegistryError, match=message):
        check_names("tiny")
    assert len(list(migrate("tiny", dry=True))) == 5
    assert find_expert("tiny", "digits", EXPERTS["digits"]) is None
    assert "tiny.pool 1 -> tiny.pool.mine (champion)" in [str(step) for step in migrate("tiny")]
    check_names("tiny")
    assert list(migrate("tiny")) == []
    for task, digest in EXPERTS.items():
        version = find_expert("tiny", task, digest)
        assert version is not None
        tags = {"status": "registered", "rank": "2", "rows": "1,000"}
        assert (version.name, version.tags) == (f"tiny.expert.{task}", tags)
    assert find_expert("tiny", "clock", "half") is None, "it was never finished"
    assert find_pool("tiny", "mine", "pool-2") is not None
    in_use = champion("tiny.pool.mine")
    assert in_use is not None
    assert int(in_use.version) == 1
    assert len(versions_of("tiny.experts")) == 3, "pools in use refer to them"


@pytest.mark.usefixtures("former")
def test_a_pool_that_names_a_former_model_finds_its_expert_without_it(tmp_path: Path) -> None:
    list(migrate("tiny"))
    client = MlflowClient()
    for version in versions_of("tiny.experts"):
        client.delete_model_version("tiny.experts", str(version.version))
    client.delete_registered_model("tiny.experts")
    fetch_expert(
        ExpertReference(name="clock", digest=EXPERTS["clock"], model="tiny.experts", version=2), tmp_path / "fetched"
    )
    assert Expert.load(tmp_path / "fetched").card.config_digest == EXPERTS["clock"]


@pytest.mark.usefixtures("former")
def test_stopped_anywhere_a_migration_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after every call that writes, one after the other."""
    writers = ("log_model_params", "create_registered_model", "create_model_version", "set_registered_model_alias")
    calls = 0
    while True:
        allowed = calls
        with monkeypatch.context() as patch:
            for name in (*writers, "set_registered_model_tag"):
                original = getattr(MlflowClient, name)

                def limited(*args, _original=original, **settings):
                    nonlocal allowed
                    if allowed == 0:
                        raise KeyboardInterrupt
                    allowed -= 1
                    return _original(*args, **settings)

                patch.setattr(MlflowClient, name, limited)
            try:
                list(migrate("tiny"))
                break
            except KeyboardInterrupt:
                calls += 1
    assert calls > 3
    check_names("tiny")
    names = ["tiny.base", "tiny.expert.clock", "tiny.expert.digits", "tiny.pool.mine"]
    assert [len(versions_of(name)) for name in names] == [1, 1, 1, 2]
    in_use = champion("tiny.pool.mine")
    assert in_use is not None
    assert int(in_use.version) == 1


@pytest.mark.usefixtures("former")
def test_a_champion_that_was_chosen_since_stays() -> None:
    list(migrate("tiny"))
    promote("tiny.pool.mine", 2, checked=False)
    list(migrate("tiny"))
    in_use = champion("tiny.pool.mine")
    assert in_use is not None
    assert int(in_use.version) == 2


def test_one_adds_to_a_pool_of_an_earlier_release(
    start: ModelVersion, extend: Callable[..., ModelVersion], experiment: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Its card names former models, its parameters do not say the base as those of today do."""
    client, run, base_fingerprint = MlflowClient(), start.run_id, fingerprint(tiny_folder)
    shutil.copytree(logged_model(start).artifact_location.removeprefix("file://"), tmp_path / "pool")
    card = tmp_path / "pool/artifacts/pool/pool.json"
    experts = [{"name": "digits", "digest": "e1", "model": "untrained.experts", "version": 1}]
    card.write_text(json.dumps(json.loads(card.read_text()) | {"experts": experts}))
    expert = logged_model(get_version("untrained.expert.digits", 1)).artifact_location.removeprefix("file://")
    base = {"base_label": "untrained", "path": str(tiny_folder)}
    pool = {
        "base_label": "untrained",
        "base_fingerprint": base_fingerprint,
        "base_version": "1",
        "null_expert": "False",
    }
    for name, digest, folder, tags in (
        ("untrained.bases", base_fingerprint, str(tiny_folder), base),
        ("untrained.experts", "e1", expert, {"task": "digits", "rank": "2"}),
        ("untrained.pool", "p1", str(tmp_path / "pool"), pool),
    ):
        model = client.create_logged_model(experiment, "x", run)
        client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, "READY")
        client.create_registered_model(name)
        tags = tags | {"config_digest": digest, "finished": "true"}
        client.create_model_version(name, f"models:/{model.model_id}", run, tags=tags, model_id=model.model_id)
    client.log_param(run, "name", "mine")
    for name in (POOL, "untrained.expert.digits", "untrained.base"):
        client.delete_registered_model(name)

    with pytest.raises(
        RegistryError, match=r"untrained\.pool/1 is of an earlier release: `pointsman registry migrate`"
    ):
        open_pool(get_version("untrained.pool", 1))
    list(migrate("untrained"))
    migrated = open_pool(get_version("untrained.pool.mine", 1))
    source = "demo://clock/train"
    settings = AddConfig.model_validate({"task": {"name": "clock", "train": source, "eval": source}})
    config = stream_of(settings, migrated, mlflow.get_tracking_uri())
    assert (config.base.path, config.pool, config.expert.rank) == (str(tiny_folder), "mine", 2)
    made = extend(migrated.version, "clock")
    assert open_pool(made).pool.names == ["digits", "clock"]
    assert base_of(made).name == base_of(migrated.version).name == "untrained.base"
    assert open_pool(made).pool.experts["digits"].card.config_digest == "e1"
