"""Statistics of base prompts: stored once for all versions of pools, found by digest, in the registry alone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion

from jobs.benchmark.tools.registry_step import WRITING
from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.models.checkpoints import fingerprint
from pipeline.registry import base_prompts
from pipeline.registry import pools as pools_module
from pipeline.registry.base_prompts import BASE_PROMPTS, FILE, is_complete
from pipeline.registry.experts import register_expert
from pipeline.registry.exports import ExportFormat, prepare_export
from pipeline.registry.garbage import find_garbage, remove
from pipeline.registry.loading import download_pool, fetched_pool
from pipeline.registry.pools import register_pool
from pipeline.registry.promotion import promote
from pipeline.registry.retries import RegistryError
from pipeline.registry.successors import open_pool, register_successor, retire_expert
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import all_logged_models, logged_model, number, versions_of
from pipeline.routing import Expert, Pool, PromptStatistics
from pipeline.routing.features import source_width
from pipeline.routing.null import write_null
from pipeline.routing.pool import PoolCard
from pipeline.routing.store import ExpertReference, null_cache_folder
from tests.registry.conftest import WIDTH, MakeExpert

POOL = "untrained.pool.demo"
FEATURES = source_width(WIDTH)


def null_of(features: int, seed: int = 0) -> list[PromptStatistics]:
    """Statistics of made-up base prompts, of 12 components."""
    random = torch.Generator().manual_seed(seed)
    return [PromptStatistics.of(seed + torch.randn(8, features, generator=random)) for _ in range(12)]


def stored() -> list[LoggedModel]:
    return [model for model in all_logged_models() if model.model_type == BASE_PROMPTS]


def place(model: LoggedModel) -> Path:
    return Path(model.artifact_location.removeprefix("file://"))


def files_of(version: ModelVersion) -> list[Path]:
    return [file for file in place(logged_model(version)).rglob("*") if file.is_file()]


Register = Callable[..., ModelVersion]


@pytest.fixture
def register(experiment: str, make_expert: MakeExpert, tiny_folder: Path, tmp_path: Path) -> Register:
    """Registers pool `demo` of these tasks, with the statistics of base prompts that are given."""

    def register(tasks: Sequence[str], null: Sequence[PromptStatistics], digest: str = "") -> ModelVersion:
        experts = {}
        for task in tasks:
            expert = make_expert(task, f"of-{task}")
            if null and (width := null[0].width) != expert.statistics.width:
                random = torch.Generator().manual_seed(5)
                card = expert.card.model_copy(update={"config_digest": f"of-{task}-{width}"})
                narrow = PromptStatistics.of(torch.randn(8, width, generator=random))
                expert = replace(expert, card=card, statistics=narrow)
            experts[task] = expert
        pool = Pool("untrained", fingerprint(tiny_folder), RouterConfig(), experts.values(), null)
        with tracked_run(experiment, "demo", "run"):
            versions = {name: _registered(expert, tmp_path / name) for name, expert in experts.items()}
            name = digest or f"{'-'.join(tasks)}-{pool.card.null_digest}"
            return register_pool(
                pool, BaseModelConfig(path=str(tiny_folder)), name="demo", digest=name, experts=versions
            )

    return register


def _registered(expert: Expert, folder: Path) -> ModelVersion:
    return register_expert("untrained", expert.save(folder))


@pytest.fixture
def former() -> Iterator[Callable[[], None]]:
    """Makes `register` write versions as an earlier release did, with the statistics inside; gives how to end it."""
    patch = pytest.MonkeyPatch()

    def refer(pool: Pool, folder: Path, references: Mapping[str, ExpertReference]) -> Path:
        folder.mkdir()
        write_null(folder / FILE, pool.null, pool.null_layer_statistics)
        card = pool.card.model_copy(update={"experts": tuple(references[name] for name in pool.names)})
        (folder / "pool.json").write_text(card.model_dump_json(exclude={"retired"}))
        return folder

    patch.setattr(Pool, "refer", refer)
    patch.setattr(pools_module, "BASE_PROMPTS", "unknown_then")
    patch.setattr(pools_module, "keep_base_prompts", lambda *arguments: None)
    yield patch.undo
    patch.undo()


@pytest.mark.parametrize("width", [128, 384, 1024])
def test_a_version_is_as_large_at_every_width(register: Register, width: int) -> None:
    """And far below a megabyte; the statistics, stored once, grow with the square of the width."""
    versions = [register(tasks, null_of(width)) for tasks in (["digits"], ["digits", "clock"])]
    sizes = [sum(file.stat().st_size for file in files_of(version)) for version in versions]
    assert not any(file.suffix == ".safetensors" for version in versions for file in files_of(version))
    assert max(sizes) < 300_000
    assert sizes[1] - sizes[0] < 1000
    (model,) = stored()
    assert (place(model) / FILE).stat().st_size > 12 * 2 * width * width
    assert logged_model(versions[1]).params[BASE_PROMPTS] == model.params["digest"]


def test_a_version_is_loaded_from_the_registry_alone(register: Register, cache: Path) -> None:
    null = null_of(FEATURES)
    version = register(["digits"], null)
    assert not cache.exists()
    for _ in range(2):
        pool = fetched_pool(f"{POOL}/{version.version}")
        assert [c.count for c in pool.null] == [8] * 12
        assert pool.null[3].mean_F.equal(null[3].mean_F)
        (file,) = null_cache_folder().glob("*.safetensors")
    assert file.stem == pool.card.null_digest == logged_model(version).params[BASE_PROMPTS]
    file.write_bytes(b"damaged")
    assert fetched_pool(f"{POOL}/1").card.null_digest == file.stem


def test_other_statistics_are_stored_beside(register: Register) -> None:
    digests = [register(["digits"], null_of(FEATURES, seed)).version for seed in (0, 1, 0)]
    assert [int(n) for n in digests] == [1, 2, 1]
    assert len(stored()) == 2
    one, other = (fetched_pool(f"{POOL}/{n}") for n in (1, 2))
    assert not one.null[0].mean_F.equal(other.null[0].mean_F)
    assert register(["digits"], []).tags["status"] == "registered"
    assert fetched_pool(f"{POOL}/3").null == ()
    assert len(stored()) == 2


def test_successors_refer_to_the_same(
    register: Register, experiment: str, make_expert: MakeExpert, tmp_path: Path
) -> None:
    start = register(["digits"], null_of(FEATURES))
    with tracked_run(experiment, "later", "later"):
        version = _registered(make_expert("clock", "c"), tmp_path / "later")
        opened = open_pool(start)
        added = register_successor(
            opened, opened.pool.add(make_expert("clock", "c")), ["added", "clock"], experts=[version]
        )
        retired = retire_expert(added, "digits")
    assert number(retired) == 3
    assert {logged_model(v).params[BASE_PROMPTS] for v in (start, added, retired)} == {stored()[0].params["digest"]}
    assert len(stored()) == 1
    assert int(promote(POOL, 3).version) == 3


@pytest.mark.parametrize("cut", ["file", "bytes", "model"])
def test_what_was_lost_is_named_and_learning_again_brings_it_back(register: Register, cache: Path, cut: str) -> None:
    version = register(["digits"], null_of(FEATURES))
    (model,) = stored()
    if cut == "model":
        MlflowClient().delete_logged_model(model.model_id)
        lost = "does not have them"
    elif cut == "file":
        (place(model) / FILE).unlink()
        lost = rf"{FILE} is missing"
    else:
        (place(model) / FILE).write_bytes((place(model) / FILE).read_bytes()[:-9])
        lost = rf"{FILE} (has \d+ bytes instead of \d+|does not hold what was stored)"
    with pytest.raises(RegistryError, match=rf"{POOL}/1 needs statistics of base prompts, .*{lost}.*`pointsman learn`"):
        promote(POOL, version.version)
    with pytest.raises(
        RegistryError, match=rf"{POOL}/1 needs the statistics of base prompts.*{lost}.*`pointsman learn`"
    ):
        fetched_pool(f"{POOL}/1")
    assert int(register(["digits"], null_of(FEATURES)).version) == 1, "the same command again"
    assert fetched_pool(f"{POOL}/1").null
    assert int(promote(POOL, 1).version) == 1


def test_changed_bytes_are_no_statistics(register: Register, cache: Path) -> None:
    register(["digits"], null_of(FEATURES))
    file = place(stored()[0]) / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        RegistryError, match=rf"{FILE} does not hold what was stored: bring that file back, or delete it"
    ):
        fetched_pool(f"{POOL}/1")
    file.write_bytes(whole)
    assert fetched_pool(f"{POOL}/1").null


def test_a_damaged_version_names_itself_and_the_remedy(register: Register) -> None:
    version = register(["digits"], null_of(FEATURES))
    card = place(logged_model(version)) / "artifacts" / "pool" / "pool.json"
    card.write_text(card.read_text()[:-9])
    with pytest.raises(
        RegistryError, match=rf"^{POOL}/1 is damaged in its registry: pool\.json: .*; bring its files back"
    ):
        fetched_pool(f"{POOL}/1")


def test_a_version_of_an_earlier_release_goes_on(
    register: Register, former: Callable[[], None], experiment: str, tmp_path: Path
) -> None:
    """It holds its statistics itself: loaded, promoted, exported, and changed; only what is new refers to them."""
    old = register(["digits"], null_of(FEATURES))
    former()
    assert stored() == []
    assert any(file.name == FILE for file in files_of(old))
    null = null_of(FEATURES)
    assert fetched_pool(f"{POOL}/1").null[0].mean_F.equal(null[0].mean_F)
    assert int(promote(POOL, 1).version) == 1
    assert int(register(["digits"], null).version) == 1
    assert stored() == [], "nothing of it was lost"
    prepare_export(old, ExportFormat.POOL, tmp_path / "scratch").write(tmp_path / "out")
    assert len(Pool.load(tmp_path / "out").null) == 12
    with tracked_run(experiment, "later", "later"):
        made = retire_expert(old, "digits")
    assert [model.params["digest"] for model in stored()] == [fetched_pool(f"{POOL}/2").card.null_digest]
    assert int(promote(POOL, made.version).version) == 2
    card = place(logged_model(old)) / "artifacts" / "pool" / FILE
    card.unlink()
    with pytest.raises(RegistryError, match=rf"{POOL}/1 is damaged: .*{FILE} is missing"):
        promote(POOL, 1)
    with pytest.raises(RegistryError, match=rf"{POOL}/1 is damaged in its registry: .*{FILE} is missing"):
        fetched_pool(f"{POOL}/1")


def test_an_export_holds_them(register: Register, cache: Path, tmp_path: Path) -> None:
    version = register(["digits"], null_of(FEATURES))
    prepare_export(version, ExportFormat.POOL, tmp_path / "scratch").write(tmp_path / "out")
    shutil.rmtree(cache)
    assert len(Pool.load(tmp_path / "out").null) == 12
    assert PoolCard.read(tmp_path / "out").format_version == 3, "earlier releases read it"


def test_a_versions_own_folder_says_what_it_lacks(register: Register, tmp_path: Path) -> None:
    register(["digits"], null_of(FEATURES))
    folder = download_pool(f"{POOL}/1", tmp_path)
    with pytest.raises(ValueError, match=r"safetensors: missing; load the pool from its registry, which fetches them"):
        Pool.load(folder)
    assert PoolCard.read(folder).format_version == 4, "earlier releases say that a newer one wrote it"
    fetched_pool(f"{POOL}/1")
    assert Pool.load(folder).null, "by now they are in the user's cache"


def test_what_no_version_refers_to_is_garbage(register: Register, experiment: str) -> None:
    for seed in (0, 1):
        register(["digits"], null_of(FEATURES, seed))
    with tracked_run(experiment, "killed", "killed") as run:
        half = MlflowClient().create_logged_model(
            experiment, BASE_PROMPTS, run, params={"digest": "x"}, model_type=BASE_PROMPTS
        )
    assert find_garbage(hours=24) == []
    (only,) = find_garbage(hours=0)
    assert (only.name, only.why) == (half.model_id, "upload that was cut off")
    remove(only)
    MlflowClient().delete_model_version(POOL, "1")
    names = {each.why: each for each in find_garbage(hours=0)}
    unused = names["statistics of base prompts that no pool refers to"]
    assert unused.bytes > 10_000
    assert [each.name for each in names.values() if "base prompts" in each.why] == [unused.name]
    for each in [*names.values(), *names.values()]:  # as two do that delete at the same time
        remove(each)
    assert unused.bytes == 0
    assert find_garbage(hours=0) == []
    assert len(stored()) == 1
    assert fetched_pool(f"{POOL}/2").null


def test_two_that_store_the_same_at_once_do_no_harm(
    register: Register, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(base_prompts, "stored_base_prompts", lambda *arguments, **settings: None)
        register(["digits"], null_of(FEATURES))
        register(["digits", "clock"], null_of(FEATURES))
    assert len(stored()) == 2
    (second,) = find_garbage(hours=0)
    assert second.why == "statistics of base prompts that are stored once more"
    remove(second)
    assert fetched_pool(f"{POOL}/2").null
    assert find_garbage(hours=0) == []


class Killed(BaseException):
    """In place of a signal."""


def test_a_kill_at_any_step_leaves_the_registry_as_before_or_as_after(register: Register, cache: Path) -> None:
    """The statistics are stored before there is a version that refers to them; the same command goes on."""
    register(["digits"], [])
    for call in count(1):
        null, calls, survived = null_of(FEATURES, call), count(1), False

        def mortal(original: Callable[..., Any], calls: Iterator[int] = calls, call: int = call) -> Callable[..., Any]:
            def called(*arguments: Any, **settings: Any) -> Any:
                if next(calls) == call:
                    raise Killed
                return original(*arguments, **settings)

            return called

        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            for name in WRITING:
                patch.setattr(MlflowClient, name, mortal(getattr(MlflowClient, name)))
            register(["digits"], null)
            survived = True
        for version in versions_of(POOL)[:1]:
            fetched_pool(f"{POOL}/{version.version}")
        register(["digits"], null)
        assert len(versions_of(POOL)) == call + 1
        assert fetched_pool(f"{POOL}/{call + 1}").null[0].mean_F.equal(null[0].mean_F)
        complete = [model for model in stored() if is_complete(model)]
        assert len(complete) == call, "neither lost nor doubled"
        if survived:
            break
    assert call > 8


def test_two_processes_load_at_once_where_only_the_registry_is(register: Register, cache: Path, tmp_path: Path) -> None:
    """As MLflow loads a version: with its own code, in processes that know nothing of this project."""
    register(["digits"], null_of(FEATURES))
    code = """
import mlflow, pandas, sys, torch
torch.set_num_threads(1)
model = mlflow.pyfunc.load_model("models:/untrained.pool.demo/1")
assert model.predict(pandas.DataFrame({"prompt": ["what ?"]}), {"max_new_tokens": 1})["error"].isna().all()
assert "pipeline" not in sys.modules
pool = model.unwrap_python_model().routed.pool
print(len(pool.null), pool.card.null_digest)
"""
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    command = [sys.executable, "-I", "-c", code]
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:
        printed, said = process.communicate(timeout=400)
        assert process.returncode == 0, said
        assert printed.split()[-2:] == ["12", stored()[0].params["digest"]]
    assert len(list(null_cache_folder().glob("*.safetensors"))) == 1
