import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipeline.registry import experts, versions
from pipeline.registry.experts import download_expert, find_expert, register_expert
from pipeline.registry.tracking import RegistryError, tracked_run
from pipeline.registry.versions import logged_model
from pipeline.routing import Expert, ExpertError
from tests.registry.conftest import MakeExpert


def test_a_version_carries_its_expert(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    with tracked_run(experiment, "demo", "run") as run:
        version = register_expert("tiny", folder)
    assert (version.name, int(version.version), version.run_id) == ("tiny.experts", 1, run)
    assert {key: version.tags[key] for key in ("task", "rank", "alpha", "config_digest", "samples", "finished")} == {
        "task": "digits", "rank": "2", "alpha": "4.0", "config_digest": "aaa", "samples": "640", "finished": "true",
    }  # fmt: skip
    assert version.tags["metric.expert_loss"] == "0.25"
    assert {"base_fingerprint", "data_fingerprint", "seed"} <= set(version.tags)
    assert [output.model_id for output in MlflowClient().get_run(run).outputs.model_outputs] == [logged_model(version)]


def test_registering_twice_makes_one_version(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    assert find_expert("tiny", "aaa") is None
    with tracked_run(experiment, "demo", "run"):
        first = register_expert("tiny", folder)
        assert register_expert("tiny", folder).version == first.version
    version = find_expert("tiny", "aaa")
    assert version is not None
    assert version.version == first.version
    assert len(MlflowClient().search_model_versions("name = 'tiny.experts'")) == 1


def test_the_alias_is_the_tasks_current_version(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    with tracked_run(experiment, "demo", "run"):
        for name, digest in (("digits", "aaa"), ("clock", "bbb"), ("digits", "ccc")):
            register_expert("tiny", make_expert(name, digest).save(tmp_path / name))
    current = download_expert("tiny", "digits", tmp_path / "current")
    former = download_expert("tiny", 1, tmp_path / "former")
    assert Expert.load(current).card.config_digest == "ccc"
    assert Expert.load(former).card.config_digest == "aaa"
    with pytest.raises(RegistryError, match=r"no 'cloc' in 'tiny.experts'; .*versions 1, 2, 3 .*clock = 2, digits = 3"):
        download_expert("tiny", "cloc", tmp_path / "none")
    with pytest.raises(RegistryError, match="no '9' in"):
        download_expert("tiny", 9, tmp_path / "none")
    with pytest.raises(RegistryError, match="nothing is registered"):
        download_expert("other", "digits", tmp_path / "none")


def test_a_download_is_the_folder_that_was_registered(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    with tracked_run(experiment, "demo", "run"):
        register_expert("tiny", folder)
    into = tmp_path / "deep" / "copy"
    for _ in range(2):
        assert download_expert("tiny", "digits", into) == into
    assert sorted(p.name for p in into.iterdir()) == sorted(p.name for p in folder.iterdir())
    for file in folder.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(into / file.name)
        assert all(tensor.equal(theirs[key]) for key, tensor in ours.items())
    assert [p.name for p in into.parent.iterdir()] == ["copy"]


def test_an_untrained_expert_leaves_no_trace(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    folder = make_expert("digits", "aaa", trained=False).save(tmp_path / "digits")
    with tracked_run(experiment, "demo", "run"), pytest.raises(ExpertError, match="never trained"):
        register_expert("tiny", folder)
    assert MlflowClient().search_registered_models() == []


def test_a_half_made_version_is_not_taken_for_finished(
    experiment: str, make_expert: MakeExpert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "SETTLING_SECONDS", 0.3)
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    with tracked_run(experiment, "demo", "run"):
        register_expert("tiny", folder)
        MlflowClient().delete_model_version_tag("tiny.experts", "1", "finished")  # as after a kill before the last tag
        assert find_expert("tiny", "aaa") is None
        with pytest.raises(RegistryError, match="never finished"):
            download_expert("tiny", "digits", tmp_path / "none")
        assert int(register_expert("tiny", folder).version) == 2
    assert [int(v.version) for v in MlflowClient().search_model_versions("name = 'tiny.experts'")] == [2]
    assert Expert.load(download_expert("tiny", "digits", tmp_path / "copy")).card.config_digest == "aaa"


def test_two_that_register_the_same_at_once_get_one_version(
    experiment: str, make_expert: MakeExpert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked and found nothing; the first to make a version then takes its time."""
    folder, met = make_expert("digits", "aaa").save(tmp_path / "digits"), threading.Barrier(2)
    upload = experts.log_folder

    def upload_together(*args: Any, **settings: Any) -> str:
        met.wait(timeout=30)
        return upload(*args, **settings)

    alias = MlflowClient.set_registered_model_alias
    monkeypatch.setattr(experts, "log_folder", upload_together)
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lambda *args: (time.sleep(1.0), alias(*args)))
    with tracked_run(experiment, "demo", "run") as run, ThreadPoolExecutor(2) as pool:

        def register() -> int:
            with mlflow.start_run(run_id=run, nested=True):
                return int(register_expert("tiny", folder).version)

        numbers = [started.result(timeout=60) for started in [pool.submit(register) for _ in range(2)]]
    (version,) = MlflowClient().search_model_versions("name = 'tiny.experts'")
    assert numbers == [int(version.version)] * 2
    assert version.tags["finished"] == "true"
