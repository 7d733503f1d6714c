"""Statistics taken anew, without training: of a pool that an older release wrote, and by other router settings."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import BaseModelConfig, LearnConfig, RouterConfig, load_config
from pipeline.data.loading.batch_loader import distinct_batches
from pipeline.data.loading.training_rows import CachedRows, TrainingRows
from pipeline.errors import UserError
from pipeline.learning import recomputing, trainings
from pipeline.learning.opening import open_session
from pipeline.learning.recomputing import pool_to_renew, recompute
from pipeline.learning.registering import registered_expert
from pipeline.learning.session import StreamSession
from pipeline.models.bases import Base, load_base
from pipeline.models.encoding import Encoded, collate_for, without_answer
from pipeline.models.target_modules import observed_paths
from pipeline.routing import Expert, Pool, PromptStatistics
from pipeline.routing.features import FEATURE_RULE, WIDEST, feature_width
from pipeline.routing.null import components
from pipeline.routing.serialization import OutdatedError
from pipeline.routing.store import cache_folder
from pipeline.routing.trained import TrainedExpert
from pipeline.training.gates import with_gates, without_gates
from pipeline.training.statistics_collector import LayerInputCollector, collect_features
from tests.helpers import attached, batch_of, make_expert
from tests.jobs.test_learn import stream

pytestmark = pytest.mark.ray

ROWS = {"digits": 64, "echo": 79}


@dataclasses.dataclass(frozen=True)
class Aged:
    """A pool as an older release wrote it, and what learning it by this one would give."""

    config: Path
    folder: Path
    learned: Pool
    prompts: dict[str, list[Encoded]]
    """Some of each task."""


def training_rows(session: StreamSession) -> dict[str, TrainingRows]:
    return {t.name: session.data.training_rows(t).training_rows([t.name]) for t in session.config.stream.tasks}


def as_training_records(base: Base, expert: Expert, rows: TrainingRows, router: RouterConfig) -> Expert:
    """Returns the expert with statistics of these rows, by the means of a training worker."""
    read = list(distinct_batches(rows, count=router.statistics_rows, micro_batch=16, rank=0, workers=1, seed=0))
    features, ids = collect_features(
        base.model, base, read, width=feature_width(base.width, router.feature_width), device="cpu"
    )
    observed = observed_paths(base, "auto")
    gates = with_gates(base.model, expert.adapters)
    for path, gate in gates.items():
        gate.vector.data.copy_(expert.vectors[path])
    layer_inputs = LayerInputCollector(base.model, observed)
    for part in read:
        assert part is not None
        batch = collate_for(base.processor, part)
        layer_inputs.expect(batch, len(batch["labels"]))
        with torch.no_grad():
            base.model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
    without_gates(base.model, gates)
    statistics = PromptStatistics.of(features, ids, quantile=router.quantile, shrinkage=router.shrinkage)
    samples = {path: PromptStatistics.of(sample) for path, sample in layer_inputs.collect().items()}
    return dataclasses.replace(expert, statistics=statistics, layer_statistics=samples)


@pytest.fixture(scope="module")
def aged(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Aged:
    output = tmp_path_factory.mktemp("aged")
    config = stream(tiny_folder, output)
    settings = load_config(config, [], LearnConfig)
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    experts, prompts = [], {}
    with open_session(settings, job="test", trains=False) as session:
        for seed, (name, rows) in enumerate(training_rows(session).items()):
            assert rows.count == ROWS[name]
            task = session.config.stream.tasks[seed]
            expert = make_expert(base, name, rank=4, seed=seed)
            card = expert.card.model_copy(
                update={
                    "seed": 0,
                    "data_fingerprint": session.identity.training_rows(task),
                    "identity": session.identity.parts(task) | {"feature_rule": FEATURE_RULE - 1} if seed else {},
                    "config_digest": f"old-{name}",
                    "samples": 12 * 16,
                }
            )
            config_ = expert.adapter_config | {"lora_dropout": 0.0}
            expert = dataclasses.replace(expert, card=card, adapter_config=config_)
            cached = CachedRows(rows)
            prompts[name] = [without_answer(cached[number]) for number in range(8)]
            experts.append(as_training_records(base, expert, rows, settings.router))
    learned = Pool("untrained", base.fingerprint, settings.router, experts, components(torch.randn(16, WIDEST), 2))
    folder = learned.save(output / "mini" / "pool")
    age(folder)
    return Aged(config, folder, learned, prompts)


def age(folder: Path) -> None:
    """Makes files say what those of an older release said, and hold other statistics."""
    for name in ("digits", "echo"):
        expert = Expert.load(folder / "experts" / name)
        narrow = PromptStatistics.of(torch.randn(8, 48))
        dataclasses.replace(expert, statistics=narrow, layer_statistics={}).save(folder / "experts" / name)
        change(folder / "experts" / name / "expert.json", feature_rule=FEATURE_RULE - 1)
    router = json.loads((folder / "pool.json").read_text())["router"] | {"a_setting_of_old": 1}
    change(folder / "pool.json", format_version=2, feature_rule=FEATURE_RULE - 1, router=router, experts=[*ROWS])


def change(file: Path, **values: Any) -> None:
    file.with_name("contents.json").unlink(missing_ok=True)  # which older releases did not write
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def run_command(config: Path, *words: str) -> str:
    outcome = CliRunner().invoke(app, ["recompute-statistics", str(config), *words])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def refused(config: Path, *words: str) -> str:
    outcome = CliRunner().invoke(app, ["recompute-statistics", str(config), *words])
    assert outcome.exit_code == 2, outcome.output
    return outcome.output


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def versions(config: Path, model: str) -> list[int]:
    client = MlflowClient(f"sqlite:///{config.parent / 'mlflow.db'}")
    return sorted(int(v.version) for v in client.search_model_versions(f"name = '{model}'"))


def new_pools(config: Path) -> set[Path]:
    return set((config.parent / "mini" / "recomputed").glob("pool-*"))


@pytest.fixture(scope="module")
def renewed(aged: Aged) -> tuple[Pool, str]:
    before = files_of(aged.folder)
    output = run_command(aged.config)  # the run's own pool
    assert files_of(aged.folder) == before, "the old pool stays"
    (folder,) = new_pools(aged.config)
    return Pool.load(folder), output


def test_an_old_pool_is_refused_with_the_command_that_renews_it(aged: Aged) -> None:
    with pytest.raises(OutdatedError, match=rf"`pointsman recompute-statistics CONFIG --pool {aged.folder}`"):
        Pool.load(aged.folder)


def test_statistics_are_those_of_a_pool_that_is_learned_afresh(aged: Aged, renewed: tuple[Pool, str]) -> None:
    pool, _ = renewed
    assert pool.names == aged.learned.names
    assert pool.router == aged.learned.router
    for name, expert in pool.experts.items():
        afresh = aged.learned.experts[name]
        assert expert.statistics.count == ROWS[name]
        assert_same(expert.statistics, afresh.statistics)
        assert expert.statistics.threshold == pytest.approx(afresh.statistics.threshold, rel=1e-4)
        assert expert.layer_statistics.keys() == afresh.layer_statistics.keys() != set()
        for path, layer_statistics in expert.layer_statistics.items():
            assert_same(layer_statistics, afresh.layer_statistics[path], atol=1e-4)
        for path, adapter in expert.adapters.items():
            assert adapter.b_OR.equal(afresh.adapters[path].b_OR)
            assert expert.vectors[path].equal(afresh.vectors[path])
    assert sum(component.count for component in pool.null) == 64
    assert {component.width for component in pool.null} == {WIDEST}


def assert_same(actual: PromptStatistics, expected: PromptStatistics, *, atol: float = 1e-6) -> None:
    assert actual.count == expected.count
    torch.testing.assert_close(actual.mean_F, expected.mean_F, rtol=1e-6, atol=atol)
    covariances = actual.scatter_FF / actual.count, expected.scatter_FF / expected.count
    torch.testing.assert_close(*covariances, rtol=1e-5, atol=atol)


def test_the_new_pool_routes(aged: Aged, renewed: tuple[Pool, str], tiny_base: Base) -> None:
    with attached(tiny_base, renewed[0]) as routed:
        for name, prompts in aged.prompts.items():
            with torch.inference_mode():
                tiny_base.model(**batch_of(tiny_base, prompts))
            assert [decision.expert for decision in routed.decisions] == [name] * len(prompts)


def test_one_line_says_what_was_done(aged: Aged, renewed: tuple[Pool, str]) -> None:
    (folder,) = new_pools(aged.config)
    last = renewed[1].splitlines()[-1]
    assert last.startswith(f"2 of 2 experts, {sum(ROWS.values())} prompts read in ")
    assert last.endswith(
        "version 2 of untrained.pool.mini (the old ones stay, and so does champion: `learn` lets the gate decide), in "
        f"{folder}"
    )
    assert [versions(aged.config, f"untrained.expert.{task}") for task in ("digits", "echo")] == [[1], [1]]
    assert versions(aged.config, "untrained.pool.mini") == [1, 2], "as learning makes them: of digits, of both"


def test_learning_goes_on_from_the_recomputed_experts(
    aged: Aged, renewed: tuple[Pool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "_trained", lambda *arguments: pytest.fail("trained again"))
    settings = load_config(aged.config, ["stream.on_change=fail"], LearnConfig)
    with open_session(settings, job="test", trains=False) as session:
        begun = trainings.Trainings(session)
        for task in settings.stream.tasks:
            trained = begun.expert(task)
            assert trained.before
            actual = registered_expert(session, task, trained)
            assert_same(actual.expert.expert.statistics, renewed[0].experts[task.name].statistics)
            assert (actual.version.name, int(actual.version.version)) == (f"untrained.expert.{task.name}", 1)
            assert actual.metrics["samples"] == 12 * 16
            assert actual.metrics["rows"] == ROWS[task.name]
            assert actual.metrics["quarantined"] == (task.name == "echo")


def test_a_registered_pool_explains_itself(
    aged: Aged, renewed: tuple[Pool, str], tiny_folder: Path, tmp_path: Path
) -> None:
    """Its experts come from the registry: into the cache, not from the run that made them."""
    mlflow.set_tracking_uri(f"sqlite:///{aged.config.parent / 'mlflow.db'}")
    words = ["--pool", "models:/untrained.pool.mini/latest", "--prompt", "echo 3", "--base", str(tiny_folder)]
    outcome = CliRunner().invoke(app, ["explain", *words, "--plot", str(tmp_path / "why.png"), "--max-new-tokens", "2"])
    assert outcome.exit_code == 0, outcome.output
    assert "expert     echo" in outcome.output
    digests = set(renewed[0].digests)
    assert digests <= {folder.name for folder in cache_folder().iterdir()}
    assert digests <= {folder.name for folder in (aged.config.parent / "experts").iterdir()}
    assert not (aged.config.parent / "mini" / "recomputed" / "experts").exists()


def test_damaged_experts_come_from_the_registry_or_are_not_there(aged: Aged, renewed: tuple[Pool, str]) -> None:
    """Also where only their bytes tell; what neither store nor registry has is to be trained again, into its place."""
    registered = renewed[0].experts["digits"]
    card = registered.card.model_copy(update={"config_digest": "unregistered"})
    adapters = {  # which are no part of the file that is damaged
        path: dataclasses.replace(a, a_RD=a.a_RD.clone(), b_OR=a.b_OR.clone())
        for path, a in registered.adapters.items()
    }
    mine = dataclasses.replace(registered, card=card, adapters=adapters)
    with open_session(load_config(aged.config, [], LearnConfig), job="test", trains=False) as session:
        session.experts.put(mine)
        for expert, actual in ((registered, True), (mine, False)):
            reference = session.reference("digits", expert.card.config_digest)
            weights = session.experts.folder_of(reference) / "adapter_model.safetensors"
            whole = weights.read_bytes()
            weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert session.has_expert(reference) == actual
            session.experts.put(expert)
            assert weights.read_bytes() == whole
            assert session.has_expert(reference)


def test_other_settings_of_the_router_make_a_second_version(
    aged: Aged, renewed: tuple[Pool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first expert, it goes on with the second; only then anything is registered."""
    known = new_pools(aged.config)
    settings = ["router.feature_width=64", "router.statistics_rows=16", "stream.base_prompts=null"]
    words = [*settings, "--pool", "models:/untrained.pool.mini/latest"]
    compute, computed = recomputing.recomputed, []

    def stopped_at_echo(expert: TrainedExpert, *arguments: Any, **settings: Any) -> Expert:
        if expert.card.name == "echo" and "stopped" not in computed:
            computed.append("stopped")
            raise KeyboardInterrupt
        computed.append(expert.card.name)
        return compute(expert, *arguments, **settings)

    monkeypatch.setattr(recomputing, "recomputed", stopped_at_echo)
    outcome = CliRunner().invoke(app, ["recompute-statistics", str(aged.config), *words])
    assert outcome.exit_code == 130, outcome.output
    assert versions(aged.config, "untrained.expert.echo") == [1]
    output = run_command(aged.config, *words)
    assert computed == ["digits", "stopped", "echo"]
    assert "recomputed before" in output
    assert versions(aged.config, "untrained.expert.echo") == [1, 2]
    assert versions(aged.config, "untrained.pool.mini") == [1, 2, 3, 4]
    (folder,) = new_pools(aged.config) - known
    pool = Pool.load(folder)
    assert pool.router.feature_width == 64
    assert {(e.statistics.width, e.statistics.count) for e in pool.experts.values()} == {(64, 16)}
    assert pool.null == ()
    assert "without stream.base_prompts the new one abstains by distance" in output


def test_what_has_these_statistics_already_is_left_alone(aged: Aged, renewed: tuple[Pool, str]) -> None:
    (folder,) = (pool for pool in new_pools(aged.config) if Pool.load(pool).width == WIDEST)
    before = versions(aged.config, "untrained.pool.mini")
    (aged.config.parent / "echo.jsonl").rename(aged.config.parent / "away.jsonl")  # of no use to it
    try:
        output = run_command(aged.config, "--pool", str(folder))
    finally:
        (aged.config.parent / "away.jsonl").rename(aged.config.parent / "echo.jsonl")
    assert output.count("has these statistics already") == 2
    assert "0 prompts read" in output
    assert "of untrained.pool.mini (there already)" in output
    assert versions(aged.config, "untrained.pool.mini") == before


def test_all_that_is_missing_is_told_before_anything_is_done(aged: Aged, tmp_path: Path) -> None:
    """Rows that are gone, images that are, and a task that has another name."""
    rows = [
        {"images": f"{n}.png", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1"}]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(aged.folder, tmp_path / "pool")
    shutil.copytree(tmp_path / "pool" / "experts" / "echo", tmp_path / "pool" / "experts" / "clock")
    change(tmp_path / "pool" / "experts" / "clock" / "expert.json", name="clock", task="clock")
    change(tmp_path / "pool" / "pool.json", experts=["digits", "echo", "clock"])
    settings = yaml.safe_load(aged.config.read_text())
    digits, echo = settings["stream"]["tasks"]
    digits["train"] = str(tmp_path / "rows.jsonl")
    echo["train"] = str(tmp_path / "gone.jsonl")
    settings["stream"]["base_prompts"] = str(tmp_path / "gone_too.jsonl")
    config = aged.config.with_name("missing.yaml")
    config.write_text(yaml.safe_dump(settings | {"name": "missing"}))
    output = refused(config, "--pool", str(tmp_path / "pool"))
    assert "nothing was done" in output
    assert f"digits: {tmp_path}/rows.jsonl: none of its first rows can be used (are their images there?)" in output
    assert f"echo: {tmp_path}/gone.jsonl: no parquet, " in output
    assert "clock: no task of that name in stream.tasks" in output
    assert f"base prompts: {tmp_path}/gone_too.jsonl: no parquet, " in output
    assert "--skip-missing" in output
    assert not (aged.config.parent / "missing" / "recomputed").exists()
    assert "gone_too" in refused(config, "--pool", str(tmp_path / "pool"), "--skip-missing"), "never without a word"


def test_experts_whose_rows_are_gone_can_be_left_out(aged: Aged, renewed: tuple[Pool, str], tmp_path: Path) -> None:
    """The others were computed before, so that nothing is left to do but to make a pool of them."""
    (aged.config.parent / "echo.jsonl").rename(tmp_path / "echo.jsonl")
    known = new_pools(aged.config)
    try:
        assert "echo.jsonl: no parquet" in refused(aged.config)
        output = run_command(aged.config, "--skip-missing")
    finally:
        (tmp_path / "echo.jsonl").rename(aged.config.parent / "echo.jsonl")
    assert "left out: echo: " in output
    assert "1 of 2 experts, 0 prompts read" in output
    assert "version 1 of untrained.pool.mini (there already)" in output
    (folder,) = new_pools(aged.config) - known
    assert Pool.load(folder).names == ["digits"]


def test_wrong_pools_are_messages(aged: Aged, tmp_path: Path, tiny_base: Base) -> None:
    stranger = Pool("other", "0123456789abcdef", RouterConfig()).save(tmp_path / "stranger")
    empty = Pool("untrained", tiny_base.fingerprint, RouterConfig()).save(tmp_path / "empty")
    newer = shutil.copytree(aged.folder, tmp_path / "newer")
    change(newer / "pool.json", format_version=99)
    wrong = {
        str(tmp_path / "nowhere"): "no pool.json, so not a pool folder",
        str(stranger): "fingerprint 0123456789abcdef, base.path has",
        str(empty): "the pool holds no expert",
        str(newer): "format_version is 99, this code reads up to 4: a newer release wrote it; install that one",
        "models:/untrained.pool": "names no version; write it like models:/tiny.pool.demo/3",
        "models:/untrained.pool.mini/77": "no '77' in 'untrained.pool.mini'; there are versions",
    }
    with open_session(load_config(aged.config, [], LearnConfig), job="test", trains=False) as session:
        for pool, words in wrong.items():
            with pytest.raises(UserError, match=re.escape(words)):
                recompute(session, pool_to_renew(session, pool, tmp_path))
