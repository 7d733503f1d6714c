"""Results at an address: kept as they come, taken up by another machine, worked on by one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs.terminal import Terminal
from pipeline.config import LearnConfig, load_config
from pipeline.errors import UserError, stored_file
from pipeline.evaluation.answers import AnswerStore
from pipeline.learning import output as outputs
from pipeline.learning.opening import BusyError, alone_in, open_session
from pipeline.learning.output import KeptOutput, Output, open_output
from pipeline.learning.run_status import StatusFile, runs_at
from pipeline.routing import Pool
from pipeline.routing.store import ExpertReference, ExpertStore
from pipeline.storage.claim import ClaimedError, LostError
from pipeline.storage.mirror import Mirror
from pipeline.storage.remote import RemoteFolder, StorageError


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> LearnConfig:
    machine(monkeypatch, tmp_path, "one")
    task = {"name": "hum", "train": "rows.jsonl", "eval": "rows.jsonl"}
    file = tmp_path / "stream.yaml"
    file.write_text(yaml.safe_dump({"name": "mine", "stream": {"tasks": [task]}, "registry": {"uri": "http://mlflow"}}))
    return load_config(file, [f"output=local://{tmp_path}/there"], LearnConfig)


def machine(monkeypatch, tmp_path: Path, name: str) -> None:
    """From now on this process is on another machine: it has another cache, another name, and other processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    monkeypatch.setattr("socket.gethostname", lambda: name)
    monkeypatch.setattr("pipeline.storage.claim.this_machine", lambda: name)


@contextmanager
def opened(config: LearnConfig) -> Iterator[KeptOutput]:
    with open_output(config, Terminal()) as output:
        assert isinstance(output, KeptOutput)
        yield output


def store_of(output: Output) -> ExpertStore:
    def fetch(reference: ExpertReference, folder: Path) -> None:
        if not output.fetch_expert(reference, folder):
            raise UserError("not there")

    return ExpertStore(output.experts, fetch, keep=output.keep_expert)


def test_results_in_a_folder_stay_there(config: LearnConfig, tmp_path: Path) -> None:
    local = config.model_copy(update={"output": str(tmp_path / "runs")})
    with open_output(local, Terminal()) as output:
        assert output.run.local == tmp_path / "runs" / "mine"
        assert output.run.remote is None
        output.keep()
        assert output.shown(output.run.local / "a") == str(output.run.local / "a")
    assert not (tmp_path / "runs").exists()


def test_another_machine_finds_all_of_it(config: LearnConfig, known_pool: Pool, tmp_path: Path, monkeypatch) -> None:
    expert = next(iter(known_pool.experts.values()))
    reference = ExpertReference(name=expert.card.name, digest=expert.card.config_digest)
    with opened(config) as output:
        store_of(output).put(expert)
        there = RemoteFolder(config.output)
        assert f"experts/{reference.digest}/expert.json" in there.files(), "as soon as it is in the store"
        for name in ("state/task.json", "summary.json", "training/x/checkpoint/big", "quarantine/train/hum.jsonl"):
            (output.run.local / name).parent.mkdir(parents=True, exist_ok=True)
            (output.run.local / name).write_text(name)
        answers = output.data.local / "answers" / "a"
        output.pull(answers, "base")
        (answers / "base").mkdir(parents=True)
        (answers / "base" / "1.parquet").write_text("answers")
        assert output.shown(output.run.local / "summary.json") == f"{config.output}/mine/summary.json"
    machine(monkeypatch, tmp_path, "two")
    with opened(config) as output:
        assert output.run.local.is_relative_to(tmp_path / "two")
        found = {f.relative_to(output.place.local).as_posix() for f in output.place.local.rglob("*") if f.is_file()}
        assert {
            "mine/state/task.json",
            "mine/summary.json",
            "mine/quarantine/train/hum.jsonl",
        } < found
        assert not any("training" in name or "experts" in name or "answers" in name for name in found), (
            "large files, and those of all runs, come when they are needed"
        )
        output.pull(output.data.local / "answers" / "a", "base")
        assert (output.data.local / "answers" / "a" / "base" / "1.parquet").read_text() == "answers"
        assert output.has_expert(reference)
        store = store_of(output)
        assert not store.has(reference)
        assert store.load(reference).card == expert.card


def test_a_damaged_expert_at_the_address_is_replaced(
    config: LearnConfig, known_pool: Pool, tmp_path: Path, monkeypatch
) -> None:
    expert, there = next(iter(known_pool.experts.values())), RemoteFolder(config.output)
    reference = ExpertReference(name=expert.card.name, digest=expert.card.config_digest)
    name = f"experts/{reference.digest}/router.safetensors"
    with opened(config) as output:
        store_of(output).put(expert)
    whole = there.read(name)
    there.write(name, b"cut off")
    machine(monkeypatch, tmp_path, "two")
    with opened(config) as output:
        assert output.has_expert(reference)
        with pytest.raises(UserError, match="not there"):  # so it comes from the registry, or is trained again
            store_of(output).load(reference)
        store_of(output).put(expert)
    assert there.read(name) == whole


def test_a_damaged_file_of_all_runs_is_named_by_its_address(config: LearnConfig, tmp_path: Path, monkeypatch) -> None:
    """Where its copy here were deleted, it would come back."""
    there = RemoteFolder(config.output)
    for name in ("answers/a/base/1.parquet", "answers/a/base/2.parquet"):
        there.write(f"data/{name}", b"cut off")
    said = f"^{config.output}/data/answers/a/base/1.parquet: .* delete this file, and"
    with pytest.raises(UserError, match=said), opened(config) as output:
        AnswerStore(output.data.local / "answers" / "a", output.pull).of("base", ["prompt"])
    assert not (output.data.local / "answers" / "a" / "base" / "1.parquet").exists()
    assert "data/answers/a/base/1.parquet" in there.files(), "what all runs share only the user deletes"
    # What the run alone writes is decided upon here.
    own = config.folder / "state" / "task.json"
    with pytest.raises(UserError, match=f"^{own}: damaged"), opened(config), stored_file(own, "remedy"):
        raise ValueError


def test_one_process_works_on_a_run(config: LearnConfig, tmp_path: Path, monkeypatch) -> None:
    with opened(config):
        machine(monkeypatch, tmp_path, "two")
        said = r"there/mine: process \d+ on one \(since .*\) works on this run"
        with pytest.raises(ClaimedError, match=said), opened(config):
            pass
        with opened(config.model_copy(update={"name": "another"})):
            pass


def test_the_same_run_on_one_machine_is_told_by_its_lock(config: LearnConfig) -> None:
    session = open_session(config, job="learn", progress=Terminal())
    with alone_in(config.folder), pytest.raises(BusyError, match="works on this run"), session:
        pass


def test_what_cannot_be_used_is_told_before_anything_starts(config: LearnConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"output": f"local://{tmp_path}/file/runs"})
    said = rf"^local://{tmp_path}/file/runs.*: cannot be used"
    with pytest.raises(StorageError, match=said), open_session(blocked, job="learn", progress=Terminal()):
        pass


def test_who_was_replaced_ends(config: LearnConfig) -> None:
    there = RemoteFolder(config.output) / "mine"

    def replaced() -> None:
        with opened(config) as output:
            (there / "claims").delete_all()
            (output.run.local / "summary.json").write_text("late")

    with pytest.raises(LostError, match="another one has taken the run over"):
        replaced()
    assert not there.exists("summary.json"), "what the other one does there is not disturbed"


def test_what_is_new_is_copied_every_while(config: LearnConfig, monkeypatch) -> None:
    monkeypatch.setattr(outputs, "EVERY", 0.05)
    there = RemoteFolder(config.output) / "mine"
    with opened(config) as output:
        (output.run.local / "state").mkdir(parents=True)
        (output.run.local / "state" / "clock.json").write_text("{}")
        for _ in range(100):
            if there.exists("state/clock.json"):
                break
            outputs.threading.Event().wait(0.05)
        assert there.exists("state/clock.json")


def test_an_address_that_is_away_for_a_while_ends_nothing(
    config: LearnConfig, known_pool: Pool, monkeypatch, capsys
) -> None:
    there = RemoteFolder(config.output)
    expert = next(iter(known_pool.experts.values()))
    digest = expert.card.config_digest
    with opened(config) as output:
        with monkeypatch.context() as away:
            away.setattr(RemoteFolder, "upload", lambda self, *_: (_ for _ in ()).throw(StorageError("away")))
            store_of(output).put(expert)
            (output.run.local / "task.json").write_text("refers to it")
            output.keep()
        assert not (there / "mine").exists("task.json")
        output.keep()
        assert there.exists(f"experts/{digest}/expert.json")
        assert (there / "mine").exists("task.json")
    assert capsys.readouterr().out.count("away; results are kept in") == 1


def test_what_could_not_be_kept_is_an_error_at_the_end(config: LearnConfig, monkeypatch) -> None:
    def works() -> None:
        with opened(config) as output:
            (output.run.local / "summary.json").write_text("{}")
            monkeypatch.setattr(RemoteFolder, "upload", lambda self, *_: (_ for _ in ()).throw(StorageError("away")))

    with pytest.raises(StorageError, match="away"):
        works()


def test_an_error_is_kept_and_stays_the_one_that_is_told(config: LearnConfig) -> None:
    def fails() -> None:
        with opened(config) as output:
            output.run.local.joinpath("error.log").write_text("why")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (RemoteFolder(config.output) / "mine").read("error.log") == b"why"


def test_status_is_read_at_the_address(config: LearnConfig) -> None:
    there = RemoteFolder(config.output)
    assert runs_at(there) == []
    with opened(config) as output, StatusFile(output.run.local, name="mine", job="learn", tasks=["hum"]):
        output.keep()
        (run,) = runs_at(there)
        assert (run.name, run.state, run.job, run.tasks) == ("mine", "running", "learn", 1)
        assert "process" in run.where
    (run,) = runs_at(there)
    assert run.state == "finished"
    there.write("mine/state/status.json", b'{"state": "running", "job": "learn"}')
    assert runs_at(there)[0].state == "killed"


def test_a_pool_is_read_from_the_address_with_its_experts(
    config: LearnConfig, known_pool: Pool, tmp_path: Path, monkeypatch
) -> None:
    from pipeline.evaluation.pool_at_address import pool_at_address
    from pipeline.routing.store import StoredExpert

    monkeypatch.setenv("POINTSMAN_EXPERTS", str(tmp_path / "node"))
    with opened(config) as output:
        store = store_of(output)
        pool = Pool(known_pool.base_label, known_pool.base_fingerprint, known_pool.router, (), known_pool.null)
        for number, expert in enumerate(known_pool.experts.values()):
            expert = replace(expert, card=expert.card.model_copy(update={"config_digest": f"d{number}"}))
            pool = pool.add(StoredExpert(ExpertReference.of(store.put(expert)), store))
        place = output.place.at(pool.save(output.run.local / "pool"))
        assert place.remote is not None
        output.share_pool(pool, place)
        read = pool_at_address(place.remote, tmp_path / "scratch")
    assert read.names == pool.names
    assert read.digests == pool.digests
    for name in pool.names:
        assert read.experts[name].card == pool.experts[name].card
    assert sorted(p.name for p in (tmp_path / "node").iterdir() if p.is_dir()) == sorted(pool.digests)


def test_a_place_below_another_keeps_its_address() -> None:
    mirror = Mirror(Path("/here"), RemoteFolder("s3://bucket/runs?region=x"))
    assert str(mirror.at(Path("/here/demo/pool"))) == "s3://bucket/runs/demo/pool"
    assert mirror.at(Path("/elsewhere")) == Mirror(Path("/elsewhere"))
