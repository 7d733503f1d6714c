"""Bases of a registry: in place where they lie here, fetched once where not, with what they need to be loaded as here."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipeline.config import BaseModelConfig
from pipeline.models import checkpoints
from pipeline.models.checkpoints import files_of, fingerprint
from pipeline.registry.bases import base_folder, register_base
from pipeline.registry.experts import register_expert
from pipeline.registry.pools import register_pool, served_settings
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import logged_model, logged_model_id
from pipeline.routing import Pool
from tests.registry.conftest import MakeExpert


@pytest.fixture
def elsewhere(experiment: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Id of a registered base whose files a server hands out, and the downloads so far."""
    with tracked_run(experiment, "demo", "run"):
        model = logged_model(register_base(BaseModelConfig(path=str(tiny_folder))))
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "bases")
    stored = Path(model.artifact_location.removeprefix("file://"))
    downloads: list[str] = []

    def download(artifact_uri: str, dst_path: str) -> str:
        downloads.append(artifact_uri)
        return str(shutil.copytree(stored, dst_path, dirs_exist_ok=True))

    served = {"artifact_location": property(lambda self: "mlflow-artifacts:/base")}
    monkeypatch.setattr(type(model), "artifact_location", served["artifact_location"])
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    return model.model_id, stored, downloads


def test_a_base_elsewhere_is_fetched_once(elsewhere: Any, tiny_folder: Path, tmp_path: Path) -> None:
    model_id, _, downloads = elsewhere
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: base_folder(model_id), range(4)))
    (folder,) = folders
    assert len(downloads) == 1
    assert folder.is_relative_to(tmp_path / "bases")
    assert fingerprint(folder) == fingerprint(tiny_folder)
    assert [entry for entry in folder.parent.iterdir() if "staging" in entry.name] == []


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_refused(elsewhere: Any, tiny_folder: Path) -> None:
    model_id, stored, downloads = elsewhere
    (base_folder(model_id) / "model.safetensors").write_bytes(b"cut off")
    assert fingerprint(base_folder(model_id)) == fingerprint(tiny_folder)
    assert len(downloads) == 2
    (base_folder(model_id) / "config.json").unlink()
    (stored / "config.json").write_text("{}")
    with pytest.raises(RegistryError, match="is not the one that was registered"):
        base_folder(model_id)


def test_own_code_is_registered_where_it_runs(experiment: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    (folder / "modeling_own.py").write_text("OWN = 1\n")
    assert fingerprint(folder) == fingerprint(tiny_folder), "code that does not run determines no answer"
    config = BaseModelConfig(path=str(folder), revision="abc")
    with tracked_run(experiment, "demo", "run"):
        plain = register_base(config)
        with_code = register_base(config.model_copy(update={"trust_remote_code": True}))
        assert register_base(config).version == plain.version
        (folder / "modeling_own.py").write_text("OWN = 2\n")
        changed = register_base(config.model_copy(update={"trust_remote_code": True}))
    assert len({plain.version, with_code.version, changed.version}) == 3
    names = [{file.name for file in base_folder(logged_model_id(v)).iterdir()} for v in (plain, with_code)]
    assert names[1] - names[0] == {"modeling_own.py"}
    assert logged_model(plain).params["revision"] == "abc"
    assert {file.name for file in files_of(folder, code=True)} - {file.name for file in files_of(folder)} == {
        "modeling_own.py"
    }


def test_a_pool_is_loaded_elsewhere_as_here(
    experiment: str, make_expert: MakeExpert, make_pool: Callable[..., Pool], tiny_folder: Path, tmp_path: Path
) -> None:
    base = BaseModelConfig(
        path=str(tiny_folder), dtype="bfloat16", attention="eager", max_tiles=3, trust_remote_code=True
    )
    expert = make_expert("digits", "e1")
    with tracked_run(experiment, "demo", "run"):
        versions = {"digits": register_expert("untrained", expert.save(tmp_path / "digits"))}
        version = register_pool(make_pool(expert), base, name="demo", digest="p", experts=versions)
    settings = served_settings(version)
    assert settings.pop("base_model_id")
    assert settings == {
        "expert_memory": None, "dtype": "bfloat16", "attention": "eager", "max_tiles": 3, "trust_remote_code": True,
    }  # fmt: skip
