import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from safetensors import safe_open

from pipeline.config import BaseModelConfig
from pipeline.models.checkpoints import fingerprint
from pipeline.registry import versions as versions_module
from pipeline.registry.bases import base_folder
from pipeline.registry.experts import register_expert
from pipeline.registry.pools import champion, download_pool, find_pool, pip_requirements, promote, register_pool
from pipeline.registry.tracking import RegistryError, tracked_run
from pipeline.registry.versions import logged_model
from pipeline.routing import Pool
from tests.registry.conftest import MakeExpert

Learned = tuple[str, dict[str, ModelVersion]]


@pytest.fixture
def learned(
    experiment: str, make_expert: MakeExpert, make_pool: Callable[..., Pool], tiny_folder: Path, tmp_path: Path
) -> Learned:
    """Two tasks learned: pool version 1 with `digits` (digest p1), version 2 with `digits` and `clock` (p2)."""
    base = BaseModelConfig(path=str(tiny_folder))
    pool, versions = make_pool(), {}
    with tracked_run(experiment, "demo", "run") as run:
        for i, (name, centre) in enumerate((("digits", 0.0), ("clock", 3.0)), start=1):
            expert = make_expert(name, f"e{i}", centre)
            versions[name] = register_expert("untrained", expert.save(tmp_path / name))
            pool = pool.add(expert)
            register_pool(pool.save(tmp_path / f"pool{i}"), base, digest=f"p{i}", experts=versions)
    return run, versions


def test_a_version_names_its_parts(learned: Learned) -> None:
    run, versions = learned
    version = champion("untrained")
    assert (version.name, int(version.version), version.run_id) == ("untrained.pool", 2, run)
    assert version.tags["experts"] == "digits 1, clock 2"
    assert (version.tags["expert.digits"], version.tags["expert.clock"]) == ("1", "2")
    assert version.tags["router.kind"] == "prompt"
    assert version.tags["null_expert"] == "False"
    inputs = {entry.model_id for entry in MlflowClient().get_run(run).inputs.model_inputs}
    assert inputs == {logged_model(v) for v in versions.values()}


def test_the_base_is_stored_once(learned: Learned, experiment: str, tiny_folder: Path) -> None:
    """However many pools stand on it, and loading one copies nothing."""
    (version,) = MlflowClient().search_model_versions("name = 'untrained.bases'")
    folder = base_folder(logged_model(version))
    assert folder == base_folder(logged_model(version))
    assert fingerprint(folder) == fingerprint(tiny_folder) == version.tags["config_digest"]
    assert champion("untrained").tags["base_version"] == str(version.version)
    pool = Path(mlflow.artifacts.download_artifacts("models:/untrained.pool@champion"))
    names = {name for file in pool.rglob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert names
    assert not any("embed_tokens" in name for name in names)


def test_rolling_back_is_moving_the_alias(learned: Learned) -> None:
    assert int(champion("untrained").version) == 2
    assert int(promote("untrained", 1).version) == 1
    assert int(champion("untrained").version) == 1
    assert mlflow.models.get_model_info("models:/untrained.pool@champion").model_id == logged_model(
        champion("untrained")
    )
    with pytest.raises(RegistryError, match="versions 1, 2 and aliases champion = 1"):
        promote("untrained", 7)


def test_a_registered_pool_can_be_fetched(learned: Learned, tmp_path: Path) -> None:
    for address, names in (
        ("models:/untrained.pool/1", ["digits"]),
        ("models:/untrained.pool@champion", ["digits", "clock"]),
    ):
        folder = download_pool(address, tmp_path / "fetched" / str(len(address)))
        assert folder.is_relative_to(tmp_path / "fetched")
        assert Pool.load(folder).names == names
    with pytest.raises(RegistryError, match=r"no '7' in 'untrained\.pool'; there are versions 1, 2"):
        download_pool("models:/untrained.pool/7", tmp_path)
    with pytest.raises(RegistryError, match=r"'untrained\.experts' is no pool; pools are"):
        download_pool("models:/untrained.experts/1", tmp_path / "expert")
    for address in ("models:/untrained.pool", "untrained.pool/1", "models:/untrained.pool/one"):
        with pytest.raises(RegistryError, match="is no address of a pool; write it like models:/tiny.pool/3"):
            download_pool(address, tmp_path)


def test_the_same_pool_twice_is_one_version_and_undoes_no_rollback(
    learned: Learned, experiment: str, tiny_folder: Path, tmp_path: Path
) -> None:
    promote("untrained", 1)
    base, (_, versions) = BaseModelConfig(path=str(tiny_folder)), learned
    with tracked_run(experiment, "demo", "run"):
        assert int(register_pool(tmp_path / "pool2", base, digest="p2", experts=versions).version) == 2
    assert int(champion("untrained").version) == 1
    assert len(MlflowClient().search_model_versions("name = 'untrained.pool'")) == 2


def test_a_half_made_pool_is_made_again(
    learned: Learned, experiment: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions_module, "SETTLING_SECONDS", 0.3)
    MlflowClient().delete_model_version_tag("untrained.pool", "2", "finished")  # as after a kill before the last tag
    assert find_pool("untrained", "p2") is None
    base, (_, versions) = BaseModelConfig(path=str(tiny_folder)), learned
    with tracked_run(experiment, "demo", "run"):
        assert int(register_pool(tmp_path / "pool2", base, digest="p2", experts=versions).version) == 3
    assert int(champion("untrained").version) == 3
    found = MlflowClient().search_model_versions("name = 'untrained.pool'")
    assert sorted(int(version.version) for version in found) == [1, 3]


def test_a_pool_needs_the_versions_of_its_experts(
    learned: Learned, experiment: str, tiny_folder: Path, tmp_path: Path
) -> None:
    base, (_, versions) = BaseModelConfig(path=str(tiny_folder)), learned
    with tracked_run(experiment, "demo", "run"), pytest.raises(RegistryError, match="holds digits, versions are given"):
        register_pool(tmp_path / "pool1", base, digest="new", experts=versions)


def test_a_version_holds_all_that_it_needs(learned: Learned, tmp_path: Path) -> None:
    """The downloaded version answers in a directory where the project is not to be found."""
    mlflow.artifacts.download_artifacts("models:/untrained.pool@champion", dst_path=str(tmp_path / "served"))
    folder = next((tmp_path / "served").rglob("MLmodel")).parent
    code = (
        "import sys, mlflow, pandas\n"
        f"model = mlflow.pyfunc.load_model({str(folder)!r})\n"
        "answers = model.predict(pandas.DataFrame({'prompt': ['which digit is it ?']}), {'max_new_tokens': 2})\n"
        f"import pipeline; assert pipeline.__file__.startswith({str(folder)!r}), pipeline.__file__\n"
        "assert list(answers.columns) == ['answer', 'expert']\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-I", "-c", code], cwd=elsewhere, check=True)
    requirements = (folder / "requirements.txt").read_text().split()
    assert requirements == pip_requirements()
    assert not any("+" in line for line in requirements)
    assert not list((folder / "code").rglob("*.safetensors"))
