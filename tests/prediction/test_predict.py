"""Rows answered in bulk on a real Ray, by a pool of three experts: all, again, in part, and told who answers."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import ray

from cluster.local import connect
from pipeline.config import BaseModelConfig, PredictConfig, load_config
from pipeline.data.demo.abilities import ABILITIES
from pipeline.locks import file_lock
from pipeline.prediction.errors import PredictError
from pipeline.prediction.pool_source import PoolFolder
from pipeline.prediction.predict import predict
from pipeline.routing import Pool
from tests.helpers import CLAIMS, GENERAL

pytestmark = pytest.mark.ray

OWNERS = {**{ability: name for name, ability in CLAIMS.items()}, GENERAL: "base"}
BROKEN = {5, 21}
"""Rows with an image that is none."""


@dataclass
class Progress:
    """Notes what is shown; after `stop_after` pages the user presses Ctrl-C."""

    stop_after: int = 10**6
    seen: list[int] = field(default_factory=list)

    def update(self, done: int, per_second: float | None) -> None:
        self.seen.append(done)
        if len(self.seen) > self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", autouse=True)
def joined() -> None:
    connect()


@pytest.fixture(scope="module")
def source(known_pool: Pool, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PoolFolder:
    folder = known_pool.save(tmp_path_factory.mktemp("predict") / "pool")
    return PoolFolder.of(folder, BaseModelConfig(path=str(tiny_folder)))


@pytest.fixture(scope="module")
def rows(source: PoolFolder) -> Path:
    """A folder with 30 rows in two files; each has a question, perhaps an image, and who should answer; no answers."""
    folder = Path(source.address).parent / "rows"
    folder.mkdir()
    made: list[dict[str, Any]] = []
    for number in range(30):
        ability = list(OWNERS)[number % 4]
        example = ABILITIES[ability](np.random.default_rng([number, 7]))
        image = io.BytesIO()
        if example.image:
            example.image.save(image, "PNG")
        encoded = b"broken" if number in BROKEN else image.getvalue() or None
        who = "nobody" if number == 8 else OWNERS[ability]
        made.append({"id": f"r{number}", "q": example.question, "images": encoded, "who": who})
    pq.write_table(pa.Table.from_pylist(made[:17]), folder / "a.parquet")
    pq.write_table(pa.Table.from_pylist(made[17:]), folder / "b.parquet")
    return folder


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(source: PoolFolder, rows: Path, tmp_path: Path) -> Run:
    """Answers the rows into `tmp_path / out`; `fields` add to the usual settings."""

    def run(*fields: str, out: str = "out", progress: Progress | None = None, pool: PoolFolder = source) -> Any:
        usual = [f"source.path={rows}", "source.columns.question=q", "evaluation.cpus_per_worker=1", "rows_per_part=8"]
        usual += ["evaluation.batch_size=3", "evaluation.max_new_tokens=3", "data.max_bad_share=0.2", *fields]
        config = load_config(None, usual, PredictConfig)
        return predict(config, pool, tmp_path / out, progress or Progress())

    return run


def answers(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pylist()


def test_every_row_is_answered_or_set_aside(run: Run, rows: Path, tmp_path: Path) -> None:
    progress = Progress()
    summary = run(progress=progress)
    assert (summary["rows_in"], summary["rows_out"], summary["set_aside"]) == (30, 28, 2)
    found = answers(tmp_path / "out")
    assert [row["id"] for row in found] == [f"r{number}" for number in range(30) if number not in BROKEN]
    assert [(Path(row["source"]).name, row["number"]) for row in found[-2:]] == [("b.parquet", 12), ("b.parquet", 13)]
    wanted = [list(OWNERS.values())[int(row["id"][1:]) % 4] for row in found]
    assert [row["expert"] for row in found] == wanted
    assert all(0 < row["posterior"] <= 1 for row in found)
    assert summary["by_expert"] == {name: wanted.count(name) for name in wanted}
    assert progress.seen[-1] == 30
    aside = [line for file in (tmp_path / "out/quarantine").iterdir() for line in file.read_text().splitlines()]
    assert {json.loads(line)["id"] for line in aside} == {"r5", "r21"}
    assert ds.dataset(tmp_path / "out", exclude_invalid_files=True).count_rows() == 28
    assert run() == summary, "all is there"


def test_neither_workers_nor_a_stop_change_an_answer(run: Run, tmp_path: Path) -> None:
    run(out="whole")
    with pytest.raises(KeyboardInterrupt):
        run("evaluation.workers=2", progress=Progress(stop_after=8))
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("part-*.parquet")}
    assert 1 <= len(done) < 4
    assert not (tmp_path / "out/summary.json").exists()
    summary = run("evaluation.workers=2")
    assert all(file.stat().st_mtime_ns == time for file, time in done.items()), "not answered again"
    assert (summary["rows_in"], summary["rows_out"]) == (30, 28)
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    (tmp_path / "out/part-000001.parquet").unlink()
    assert run()["rows_out"] == 28
    assert answers(tmp_path / "out") == answers(tmp_path / "whole"), "also a part between others"


@dataclass
class Killing(Progress):
    """Kills a worker's process when the first page is back."""

    killed: list[int] = field(default_factory=list)

    def update(self, done: int, per_second: float | None) -> None:
        if done and not self.killed:
            workers = [p for p in psutil.process_iter(["cmdline"]) if "ray::PoolPredictor" in str(p.info["cmdline"])]
            mine = [p for p in workers if _of_this_ray(p)]
            mine[0].kill()
            self.killed.append(mine[0].pid)


def _of_this_ray(process: psutil.Process) -> bool:
    session = ray._private.worker._global_node.get_session_dir_path()
    return any(session in " ".join(parent.cmdline()) for parent in process.parents())


def test_a_worker_that_dies_loses_nothing(run: Run, tmp_path: Path) -> None:
    run(out="whole")
    killing = Killing()
    assert run(progress=killing)["rows_out"] == 28
    assert killing.killed
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")


def test_who_answers_can_be_told(run: Run, tmp_path: Path) -> None:
    summary = run("told=who", out="column")
    assert summary["set_aside"] == 3
    found = answers(tmp_path / "column")
    assert [row["expert"] for row in found] == [list(OWNERS.values())[int(row["id"][1:]) % 4] for row in found]
    assert {row["posterior"] for row in found} == {None}
    text = "".join(file.read_text() for file in (tmp_path / "column/quarantine").iterdir())
    assert "no expert 'nobody' in the pool; there are: reader, speaker, painter, and base" in text
    assert run("told=painter", "source.limit=4", out="one")["by_expert"] == {"painter": 4}
    with pytest.raises(
        PredictError, match="none of the first 8 rows can be answered: column 'task', which names the task"
    ):
        run("told=task", out="none")


def test_a_folder_holds_answers_of_one_kind(run: Run, source: PoolFolder, tmp_path: Path) -> None:
    run("source.limit=4")
    with pytest.raises(
        PredictError, match=r"holds answers with another rows and another source: .*'limit': 4\}, now .*'limit': 5\}"
    ):
        run("source.limit=5")
    with pytest.raises(
        PredictError, match=r"another max_new_tokens: 3, now 4; choose another folder, or empty this one"
    ):
        run("source.limit=4", "evaluation.max_new_tokens=4")
    smaller = Pool.load(source.address).remove("painter").save(tmp_path / "smaller")
    with pytest.raises(PredictError, match="another pool"):
        run("source.limit=4", pool=PoolFolder.of(smaller, source.base_config))
    with (
        file_lock(tmp_path / "out/predict.lock"),
        pytest.raises(PredictError, match="writes answers there; wait for its end"),
    ):
        run("source.limit=4")


def test_too_many_bad_rows_end_with_a_mistake_when_all_else_is_answered(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        PredictError, match=r"2 of 30 rows were set aside \(data\.max_bad_share allows 1%\).*First: r5: "
    ):
        run("data.max_bad_share=0.01")
    assert len(answers(tmp_path / "out")) == 28
    assert run("data.max_bad_share=0.1")["set_aside"] == 2


def test_columns_that_are_not_named_end_it_at_once(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        PredictError, match=r"none of the first 8 rows can be answered: column 'query' is missing or null; name the"
    ):
        run("source.columns.question=query")
    assert run()["rows_in"] == 30, "the same folder, since nothing was written"


def test_another_base_is_refused(run: Run, source: PoolFolder) -> None:
    other = PoolFolder.of(Path(source.address), BaseModelConfig())
    with pytest.raises(
        PredictError, match=r"made for base 'tiny' with fingerprint .*; name the pool's base with base\.path"
    ):
        run(pool=other)
