import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipeline.registry import experts
from pipeline.registry.experts import download_expert, find_expert, register_expert
from pipeline.registry.tracking import RegistryError, tracked_run
from pipeline.registry.versions import logged_model, logged_model_id
from pipeline.routing import Expert, ExpertError
from tests.registry.conftest import MakeExpert


def test_a_version_carries_its_expert(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    with tracked_run(experiment, "demo", "run") as run:
        version = register_expert("tiny", folder, rows=1500)
    assert (version.name, int(version.version), version.run_id) == ("tiny.expert.digits", 1, run)
    assert version.tags == {"rank": "2", "rows": "1,500", "status": "registered"}
    assert version.description.startswith("LoRA of rank 2 for task `digits` over base `tiny`, with")
    params = logged_model(version).params
    assert {key: params[key] for key in ("task", "rank", "alpha", "digest", "samples", "metric.expert_loss")} == {
        "task": "digits", "rank": "2", "alpha": "4.0", "digest": "aaa", "samples": "640", "metric.expert_loss": "0.25",
    }  # fmt: skip
    assert {"base_fingerprint", "data_fingerprint", "seed"} <= set(params)
    (output,) = MlflowClient().get_run(run).outputs.model_outputs
    assert output.model_id == logged_model_id(version)


def test_registering_twice_makes_one_version(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    assert find_expert("tiny", "digits", "aaa") is None
    with tracked_run(experiment, "demo", "run"):
        first = register_expert("tiny", folder)
        assert register_expert("tiny", folder).version == first.version
    version = find_expert("tiny", "digits", "aaa")
    assert version is not None
    assert version.version == first.version
    assert len(MlflowClient().search_model_versions("name = 'tiny.expert.digits'")) == 1


def test_versions_are_found_in_experiments_that_came_later(
    experiment: str, make_expert: MakeExpert, tmp_path: Path
) -> None:
    """The list of experiments is kept for a while: one's own is always in it, and another's never doubles a version."""
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    assert find_expert("tiny", "digits", "aaa") is None
    with tracked_run(
        MlflowClient().create_experiment("another's", artifact_location=(tmp_path / "another").as_uri()), "demo", "run"
    ):
        first = register_expert("tiny", folder)
        assert find_expert("tiny", "digits", "aaa") is not None
    with tracked_run(experiment, "demo", "run"):
        assert register_expert("tiny", folder).version == first.version


def test_every_task_has_its_own_model(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    with tracked_run(experiment, "demo", "run"):
        for name, digest in (("digits", "aaa"), ("clock", "bbb"), ("digits", "ccc")):
            register_expert("tiny", make_expert(name, digest).save(tmp_path / name))
    newest = download_expert("tiny", "digits", "latest", tmp_path / "newest")
    former = download_expert("tiny", "digits", 1, tmp_path / "former")
    assert Expert.load(newest).card.config_digest == "ccc"
    assert Expert.load(former).card.config_digest == "aaa"
    for version in ("9", "current"):
        with pytest.raises(
            RegistryError, match=rf"no '{version}' in 'tiny\.expert\.digits'; there are versions 1, 2 and"
        ):
            download_expert("tiny", "digits", version, tmp_path / "none")
    with pytest.raises(RegistryError, match="nothing is registered"):
        download_expert("other", "digits", 1, tmp_path / "none")


def test_a_download_is_the_folder_that_was_registered(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    with tracked_run(experiment, "demo", "run"):
        register_expert("tiny", folder)
    into = tmp_path / "deep" / "copy"
    for _ in range(2):
        assert download_expert("tiny", "digits", 1, into) == into
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


def test_what_a_killed_process_uploaded_is_not_found(
    experiment: str, make_expert: MakeExpert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_expert("digits", "aaa").save(tmp_path / "digits")
    with tracked_run(experiment, "demo", "run"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "create_model_version", interrupted)
            with pytest.raises(KeyboardInterrupt):
                register_expert("tiny", folder)
        assert find_expert("tiny", "digits", "aaa") is None
        with pytest.raises(RegistryError, match="it has no versions"):
            download_expert("tiny", "digits", "latest", tmp_path / "none")
        assert int(register_expert("tiny", folder).version) == 1
    assert Expert.load(download_expert("tiny", "digits", "latest", tmp_path / "copy")).card.config_digest == "aaa"


def interrupted(*args: Any, **settings: Any) -> None:
    raise KeyboardInterrupt


def test_two_that_register_the_same_at_once_get_one_version(
    experiment: str, make_expert: MakeExpert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked and found nothing."""
    folder, met = make_expert("digits", "aaa").save(tmp_path / "digits"), threading.Barrier(2)
    upload = experts.log_folder

    def upload_together(*args: Any, **settings: Any) -> str:
        met.wait(timeout=30)
        return upload(*args, **settings)

    monkeypatch.setattr(experts, "log_folder", upload_together)
    with tracked_run(experiment, "demo", "run") as run, ThreadPoolExecutor(2) as pool:

        def register() -> int:
            with mlflow.start_run(run_id=run, nested=True):
                return int(register_expert("tiny", folder).version)

        numbers = [started.result(timeout=60) for started in [pool.submit(register) for _ in range(2)]]
    (version,) = MlflowClient().search_model_versions("name = 'tiny.expert.digits'")
    assert numbers == [int(version.version)] * 2
