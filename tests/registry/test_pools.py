import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from safetensors.torch import load_file

from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.models.bases import Base
from pipeline.models.checkpoints import fingerprint
from pipeline.prediction.pool_source import RegisteredPool
from pipeline.registry import pools as pools_module
from pipeline.registry import served_code
from pipeline.registry.bases import base_folder
from pipeline.registry.experts import CONTENT, MissingExpertError, register_expert, registered_experts
from pipeline.registry.loading import download_pool
from pipeline.registry.pools import pip_requirements, register_pool
from pipeline.registry.promotion import champion, promote
from pipeline.registry.tracking import RegistryError, tracked_run
from pipeline.registry.versions import logged_model, logged_model_id, version_at
from pipeline.routing import Pool
from pipeline.routing.expert import FILES
from pipeline.routing.pool import PoolCard
from pipeline.routing.store import ExpertReference, ExpertStore, StoredExpert
from tests.helpers import attached
from tests.registry.conftest import LINEAR, MakeExpert

Learned = tuple[str, dict[str, ModelVersion], list[Pool]]


@pytest.fixture
def learned(
    experiment: str, make_expert: MakeExpert, make_pool: Callable[..., Pool], tiny_folder: Path, tmp_path: Path
) -> Learned:
    """Two tasks learned: pool version 1 with `digits` (digest p1), version 2 with `digits` and `clock` (p2)."""
    base = BaseModelConfig(path=str(tiny_folder))
    pool, versions, pools = make_pool(), {}, []
    with tracked_run(experiment, "demo", "run") as run:
        for i, (name, centre) in enumerate((("digits", 0.0), ("clock", 3.0)), start=1):
            expert = make_expert(name, f"e{i}", centre)
            versions[name] = register_expert("untrained", expert.save(tmp_path / name))
            pool = pool.add(expert)
            register_pool(pool, base, name="demo", digest=f"p{i}", experts=versions)
            pools.append(pool)
    return run, versions, pools


def test_a_version_names_its_parts(learned: Learned, tmp_path: Path) -> None:
    run, versions, _ = learned
    version = version_at("models:/untrained.pool.demo/latest")
    assert (version.name, int(version.version), version.run_id) == ("untrained.pool.demo", 2, run)
    assert version.tags == {"tasks": "clock, digits", "status": "registered"}
    assert "2 experts behind router `prompt`" in version.description
    folder = download_pool("models:/untrained.pool.demo/latest", tmp_path / "newest")
    references = PoolCard.read(folder).experts
    assert [(r.name, r.version, r.model) for r in references] == [
        ("digits", 1, "untrained.expert.digits"),
        ("clock", 1, "untrained.expert.clock"),
    ]
    params = logged_model(version).params
    assert (params["router.kind"], params["null_expert"], params["experts"]) == ("prompt", "False", "2")
    logged = MlflowClient().get_run(run)
    outputs = {entry.model_id for entry in logged.outputs.model_outputs}
    assert outputs >= {logged_model_id(v) for v in versions.values()}
    assert not logged.inputs.model_inputs, "its own experts"


def test_experts_of_other_runs_are_inputs(learned: Learned, experiment: str, tiny_folder: Path) -> None:
    _, versions, pools = learned
    with tracked_run(experiment, "another", "another") as run:
        register_pool(
            pools[0],
            BaseModelConfig(path=str(tiny_folder)),
            name="demo",
            digest="p9",
            experts={"digits": versions["digits"]},
        )
    (entry,) = MlflowClient().get_run(run).inputs.model_inputs
    assert entry.model_id == logged_model_id(versions["digits"])


def test_tags_do_not_grow_with_the_pool() -> None:
    names = [f"task_{number}" for number in range(1000)]
    assert pools_module._listed(names[:2]) == "task_1, task_0"
    assert pools_module._listed(names) == "task_999, task_998, task_997 and 997 more"


def test_the_base_is_stored_once(learned: Learned, experiment: str, tiny_folder: Path) -> None:
    """However many pools stand on it, and loading one copies nothing."""
    (version,) = MlflowClient().search_model_versions("name = 'untrained.base'")
    folder = base_folder(logged_model_id(version))
    assert folder == base_folder(logged_model_id(version))
    assert fingerprint(folder) == fingerprint(tiny_folder) == logged_model(version).params["digest"]
    newest = version_at("models:/untrained.pool.demo/latest")
    assert logged_model(newest).params["base_version"] == str(version.version)
    pool = Path(mlflow.artifacts.download_artifacts("models:/untrained.pool.demo/latest"))
    assert not list(pool.rglob("*.safetensors")), "neither base nor experts"


def test_no_alias_moves_by_registering(learned: Learned) -> None:
    assert champion("untrained.pool.demo") is None
    assert version_at("models:/untrained.pool.demo/latest").aliases == []


def test_streams_over_one_base_do_not_touch_each_others_pool(
    learned: Learned, experiment: str, tiny_folder: Path
) -> None:
    """Though they may share experts."""
    base, (_, versions, pools) = BaseModelConfig(path=str(tiny_folder)), learned
    promote("untrained.pool.demo", 2)
    with tracked_run(experiment, "another", "another"):
        version = register_pool(pools[0], base, name="other", digest="p1", experts={"digits": versions["digits"]})
    assert (version.name, int(version.version)) == ("untrained.pool.other", 1)
    in_use = champion("untrained.pool.demo")
    assert in_use is not None
    assert int(in_use.version) == 2


def test_a_registered_pool_can_be_fetched(learned: Learned, tmp_path: Path) -> None:
    for address, names in (
        ("models:/untrained.pool.demo/1", ["digits"]),
        ("models:/untrained.pool.demo/latest", ["digits", "clock"]),
    ):
        folder = download_pool(address, tmp_path / "fetched" / str(len(address)))
        assert folder.is_relative_to(tmp_path / "fetched")
        assert Pool.load(folder).names == names
        assert Pool.load(folder, registered_experts()).experts["digits"].card.config_digest == "e1"
    with pytest.raises(RegistryError, match=r"no '7' in 'untrained\.pool\.demo'; there are versions 1, 2"):
        download_pool("models:/untrained.pool.demo/7", tmp_path)
    with pytest.raises(RegistryError, match=r"'untrained\.expert\.digits' is the expert digits; pools are"):
        download_pool("models:/untrained.expert.digits/1", tmp_path / "expert")
    with pytest.raises(
        RegistryError, match=r"^untrained\.expert\.digits/1: 'untrained\.expert\.digits' is the expert digits"
    ):
        RegisteredPool.of("untrained.expert.digits", mlflow.get_tracking_uri(), None)
    for address in ("models:/untrained.pool.demo", "untrained.pool.demo/-1", "models:/untrained.pool.demo/one"):
        with pytest.raises(RegistryError, match=r"names no version; write it like models:/tiny\.pool\.demo/3"):
            download_pool(address, tmp_path)


def test_the_same_pool_twice_is_one_version(learned: Learned, experiment: str, tiny_folder: Path) -> None:
    base, (_, versions, pools) = BaseModelConfig(path=str(tiny_folder)), learned
    with tracked_run(experiment, "demo", "run"):
        assert int(register_pool(pools[1], base, name="demo", digest="p2", experts=versions).version) == 2
    assert len(MlflowClient().search_model_versions("name = 'untrained.pool.demo'")) == 2


def test_a_pool_needs_the_versions_of_its_experts(learned: Learned, experiment: str, tiny_folder: Path) -> None:
    base, (_, versions, pools) = BaseModelConfig(path=str(tiny_folder)), learned
    swapped = {"digits": versions["clock"], "clock": versions["digits"]}
    with tracked_run(experiment, "demo", "run"):
        with pytest.raises(RegistryError, match="holds digits, versions are given"):
            register_pool(pools[0], base, name="demo", digest="new", experts=versions)
        with pytest.raises(RegistryError, match=r"'digits' of the pool has digest e1, version 1 of .*clock has e2"):
            register_pool(pools[1], base, name="demo", digest="new", experts=swapped)


def test_a_version_is_as_large_for_three_experts_as_for_one(
    learned: Learned, experiment: str, make_expert: MakeExpert, tiny_folder: Path, tmp_path: Path
) -> None:
    """And registering it reads no expert that lies in a store."""
    base, (_, versions, _) = BaseModelConfig(path=str(tiny_folder)), learned
    store = ExpertStore(tmp_path / "store of experts")
    pool = Pool("untrained", fingerprint(tiny_folder), RouterConfig())
    sizes = []
    with tracked_run(experiment, "demo", "run"):
        for name, digest in (("digits", "e1"), ("clock", "e2"), ("later", "e3")):
            folder = store.put(make_expert(name, digest))
            pool = pool.add(StoredExpert(ExpertReference.of(folder), store))
            (folder / "adapter_model.safetensors").write_bytes(b"not read")
            versions[name] = register_expert("untrained", make_expert(name, digest).save(tmp_path / "own"))
            used = {name: versions[name] for name in pool.names}
            version = register_pool(pool, base, name="demo", digest=f"of {len(used)}", experts=used)
            location = logged_model(version).artifact_location
            files = [file for file in Path(location.removeprefix("file://")).rglob("*") if file.is_file()]
            assert not any(file.name in FILES for file in files)
            sizes.append(sum(file.stat().st_size for file in files))
    assert sizes[2] < 1.05 * sizes[0]


def test_what_is_fetched_is_fetched_once_and_checked(learned: Learned, cache: Path, tmp_path: Path) -> None:
    _, versions, pools = learned
    folder = download_pool("models:/untrained.pool.demo/latest", tmp_path / "fetched")
    store = registered_experts()
    for pool in (Pool.load(folder, store), Pool.load(folder, store)):
        for name, expert in pools[1].experts.items():
            assert pool.experts[name].adapters[LINEAR].b_OR.equal(expert.adapters[LINEAR].b_OR)
        written = {folder.name: folder.stat().st_ino for folder in cache.iterdir() if folder.is_dir()}
        assert set(written) == {"e1", "e2"}
    weights = cache / "e1" / "adapter_model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert len(Pool.load(folder, store).experts["digits"].adapters[LINEAR].b_OR)
    assert weights.read_bytes() == original
    assert [name for name, number in written.items() if (cache / name).stat().st_ino != number] == ["e1"]
    assert logged_model(versions["digits"]).params[CONTENT] == Pool.load(folder).card.experts[0].content


def test_an_expert_that_was_deleted_is_named(
    learned: Learned, experiment: str, tmp_path: Path, make_expert: MakeExpert
) -> None:
    """Until it is registered again: its digest finds the new version."""
    folder = download_pool("models:/untrained.pool.demo/latest", tmp_path / "fetched")
    MlflowClient().delete_model_version("untrained.expert.clock", "1")
    with pytest.raises(
        MissingExpertError,
        match=r"expert 'clock' \(digest e2, version 1 of untrained\.expert\.clock\): untrained\.expert\.clock at .* does not "
        r"have it\. Set MLFLOW_TRACKING_URI .* run the `pointsman learn` that made it once more",
    ):
        _ = Pool.load(folder, registered_experts()).experts["clock"]
    with tracked_run(experiment, "demo", "run"):
        register_expert("untrained", make_expert("clock", "e2", 3.0).save(tmp_path / "again"))
    assert Pool.load(folder, registered_experts()).experts["clock"].card.config_digest == "e2"


def test_a_version_needs_nothing_but_the_registry(
    learned: Learned, cache: Path, tiny_base: Base, tmp_path: Path
) -> None:
    """It answers in another process, where neither project nor experts are to be found, with the very same logits."""
    mlflow.artifacts.download_artifacts("models:/untrained.pool.demo/latest", dst_path=str(tmp_path / "served"))
    folder = next((tmp_path / "served").rglob("MLmodel")).parent
    code = f"""
import sys, mlflow, pandas, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
model = mlflow.pyfunc.load_model({str(folder)!r})
answers = model.predict(pandas.DataFrame({{"prompt": ["which digit is it ?"]}}), {{"max_new_tokens": 2}})
assert "pipeline" not in sys.modules
(package,) = [name for name in sys.modules if name.startswith("pointsman_") and "." not in name]
assert sys.modules[package].__file__.startswith({str(folder)!r})
assert list(answers.columns) == ["answer", "expert", "error"]
routed = model.unwrap_python_model().routed
ids = torch.arange(4, 12)[None]
with routed.forced("clock"), torch.inference_mode():
    save_file({{"logits": routed.model(input_ids=ids).logits}}, "logits")
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert not cache.exists()
    uri = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    subprocess.run([sys.executable, "-I", "-c", code], cwd=elsewhere, check=True, env=os.environ | uri)
    with attached(tiny_base, learned[2][1]) as routed, routed.forced("clock"), torch.inference_mode():
        logits = tiny_base.model(input_ids=torch.arange(4, 12)[None]).logits
    assert logits.equal(load_file(elsewhere / "logits")["logits"])
    requirements = (folder / "requirements.txt").read_text().split()
    assert requirements == pip_requirements()
    assert not any("+" in line for line in requirements)
    assert not list((folder / "code").rglob("*.safetensors"))


def test_versions_of_two_releases_answer_in_one_process(
    learned: Learned, experiment: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each with its own code, whichever is loaded first, and the project beside them."""
    _, versions, pools = learned
    copy = served_code.copy_code

    def newer(folder: Path) -> served_code.ServedCode:
        """The code of a release that has something new, which its model needs."""
        project = folder / "project" / "pipeline"
        shutil.copytree(Path(served_code.__file__).parents[1], project, ignore=shutil.ignore_patterns("tiny_base"))
        model = project / "registry" / "pyfunc_model.py"
        (project / "models" / "novelty.py").write_text('"""New."""\n\nNEW = "new"\n')
        model.write_text(model.read_text() + "\nfrom pipeline.models.novelty import NEW\n\nBASE = NEW\n")
        monkeypatch.setattr(served_code.pipeline, "__file__", str(project / "__init__.py"))
        return copy(folder)

    monkeypatch.setattr(pools_module, "copy_code", newer)
    with tracked_run(experiment, "demo", "run"):
        register_pool(pools[1], BaseModelConfig(path=str(tiny_folder)), name="demo", digest="p3", experts=versions)
    code = """
import sys, mlflow
for version, project in ((int(sys.argv[1]), False), (int(sys.argv[2]), True)):
    model = mlflow.pyfunc.load_model(f"models:/untrained.pool.demo/{version}").unwrap_python_model()
    assert (sys.modules[type(model).__module__].BASE == "new") == (version == 3), version
    assert "pipeline" not in sys.modules
sys.path.append(sys.argv[3])
import pipeline.registry.pyfunc_model as own
assert own.__file__.startswith(sys.argv[3]) and own.BASE == "base", own.__file__
"""
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    for order in (("2", "3"), ("3", "2")):
        command = [sys.executable, "-I", "-c", code, *order, str(Path(__file__).parents[2])]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
