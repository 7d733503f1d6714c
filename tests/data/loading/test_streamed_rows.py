"""Rows that stream: in which order they come, from which files, and what happens where they cannot be read any more."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem
from ray.util.state import list_tasks

from cluster.local import connect
from pipeline.config import BaseModelConfig, DataConfig, SourceConfig
from pipeline.data.encoded.encoding import TaskRows
from pipeline.data.errors import StreamError
from pipeline.data.loading import read_ahead
from pipeline.data.loading.batch_loader import BatchLoader, StepLayout, distinct_batches
from pipeline.data.loading.drawing import Drawable, Drawn
from pipeline.data.loading.pieces import pieces_of
from pipeline.data.loading.preprocess import PreparedData, prepare
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.data.loading.windows import LANES, WINDOW_BYTES, Span, Window, lane_windows, spans
from pipeline.models.encoding import IGNORED, collate

pytestmark = pytest.mark.ray

KINDS = ("red", "blue", "one", "two")


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    connect()


def rows(count: int) -> list[dict[str, Any]]:
    """Rows sorted by kind; the question's length, in words, does not depend on it."""
    questions = [f"{KINDS[n * 4 // count]} {n}" for n in range(count)]
    return [{"id": str(n), "question": text, "answer": "red", "n": n} for n, text in enumerate(questions)]


def write(folder: Path, ending: str, count: int, **settings: int) -> SourceConfig:
    file = folder / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows(count)), file, **settings)
    elif ending == "csv":
        file.write_text("".join(["id,question,answer\n", *(f"{r['id']},{r['question']},red\n" for r in rows(count))]))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    columns = {"question": "question", "answer": "answer"}
    return SourceConfig.model_validate({"path": str(file), "columns": columns})


def prepared(source: SourceConfig, tiny_folder: Path, folder: Path, **data: Any) -> PreparedData:
    return prepare(
        {"mine": TaskRows(source)},
        DataConfig.model_validate({"cache": "none", **data}),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=folder,
        quarantine=folder,
        answer=True,
    )


def streamed(source: SourceConfig, tiny_folder: Path, folder: Path, **data: Any) -> TrainingRows:
    training_rows = prepared(source, tiny_folder, folder, **data).training_rows(["mine"])
    assert not training_rows.cached
    return training_rows


def drawn(
    training_rows: TrainingRows, steps: range, *, batch_size: int = 8, workers: int = 1, rank: int = 0
) -> list[str]:
    """Returns the token ids of the rows of these steps, as text: each row has its own."""
    layout = StepLayout(batch_size, workers, batch_size)
    settings: dict[str, Any] = {"layout": layout, "rank": rank, "seed": 3, "collate": list}
    with BatchLoader(training_rows, steps=steps, **settings) as loader:
        return [str(row.input_ids.tolist()) for batches in loader for batch in batches for row in batch]


class Numbered(Drawable):
    """Pieces of these sizes, whose rows are named by piece and place instead of being read."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(())
        self.__dict__.update(sizes=np.array(sizes), weights=np.array(sizes))

    def rows(self, windows: Iterator[Window], pool: Any) -> Iterator[tuple[int, int]]:
        for window in windows:
            reads = zip(window.pieces.tolist(), window.starts.tolist(), window.stops.tolist(), strict=True)
            rows = [(piece, i) for piece, start, stop in reads for i in range(start, stop)]
            yield from (rows[i] for i in window.order)


def planned(
    sizes: list[int], last: int, *, first: int = 0, rank: int = 0, workers: int = 1, rows: int = 64, tasks: int = 1
) -> list[tuple[int, int]]:
    """Returns the rows, by piece and place, that a worker draws."""
    drawn = Drawn(spans(sum(sizes), [1] * workers)[rank], first, last, seed=5, window=rows)
    tasks = drawn.tasks(tasks)
    shares = [drawn.rows(Numbered(sizes), task, tasks, 0) for task in range(tasks)]
    return [next(shares[task]) for task in drawn.turns(tasks)]


SIZES = [10, 0, 7, 30, 1, 12, 16, 9]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_row_comes_once_an_epoch_over_all_workers(workers: int) -> None:
    ranks = spans(sum(SIZES), [1] * workers)
    by_rank = [planned(SIZES, 2 * len(span), rank=rank, workers=workers) for rank, span in enumerate(ranks)]
    for epoch in range(2):
        parts = [rows[epoch * len(span) : (epoch + 1) * len(span)] for rows, span in zip(by_rank, ranks, strict=True)]
        assert max(Counter(sum(parts, [])).values()) == 1
        assert len(sum(parts, [])) == sum(SIZES)
    assert by_rank[0][: len(ranks[0])] != by_rank[0][len(ranks[0]) :], "epochs differ"


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_later_start_gives_the_rows_that_would_have_come(tasks: int) -> None:
    """However many tasks read, before and after."""
    full = planned(SIZES, 300, rows=20)
    for first in (0, 1, 19, 84, 85, 86, 200):
        assert planned(SIZES, 300, first=first, rows=20, tasks=tasks) == full[first:]


def test_a_task_that_is_lost_goes_on_at_any_row() -> None:
    drawn = Drawn(spans(sum(SIZES), [1])[0], 30, 300, seed=5, window=20)
    turns = list(drawn.turns(3))
    full = [list(drawn.rows(Numbered(SIZES), task, 3, 0)) for task in range(3)]
    for first in (0, 1, 54, 55, 200):
        for task in range(3):
            rest = list(drawn.rows(Numbered(SIZES), task, 3, first))
            assert rest == full[task][turns[:first].count(task) :]


def test_rows_are_drawn_from_sixteen_pieces_at_a_time() -> None:
    order = planned([8] * 160, 1280, rows=128)
    for start in range(0, 1280, 128):
        pieces = Counter(piece for piece, _ in order[start : start + 128])
        assert set(pieces.values()) == {8}
        assert len({piece for piece, _ in order[start : start + 16]}) == 16
    assert len({tuple(index for _, index in order[lane:128:16]) for lane in range(16)}) > 12, "in random order"


def test_few_rows_are_drawn_from_all_of_them() -> None:
    """In any order: that of the first rows must not depend on where they lie."""
    epochs = planned([20], 2000, rows=64)
    firsts = Counter(index for _, index in epochs[::20])
    assert len(firsts) > 15
    assert max(firsts.values()) < 20


def test_windows_hold_no_more_bytes_than_fit() -> None:
    sizes, weights = np.full(64, 8), np.full(64, WINDOW_BYTES // LANES // 2)
    windows = list(lane_windows(sizes, weights, Span(0, 512), seed=0, epoch=0, rows=256, size=WINDOW_BYTES // LANES))
    assert [len(window.pieces) for window in windows] == [2] * 32


def test_workers_end_an_epoch_together_whatever_they_take_a_step() -> None:
    lengths = [len(span) for span in spans(160, [3, 3, 3, 3, 3, 1])]
    assert lengths == [30, 30, 30, 30, 30, 10]
    assert [len(span) for span in spans(2, [1, 1, 1])] == [2, 1, 1], "one without rows shares all of them"


@pytest.mark.parametrize(("ending", "settings"), [("jsonl", {}), ("parquet", {"row_group_size": 50})])
def test_a_large_file_sorted_by_kind_comes_mixed(ending, settings, tiny_folder, tmp_path):
    training_rows = streamed(write(tmp_path, ending, 1000, **settings), tiny_folder, tmp_path, shuffle_rows=256)
    epochs = drawn(training_rows, range(250))
    first, second = epochs[:1000], epochs[1000:]
    in_file = [str(row["input_ids"]) for row in _in_file(training_rows)]
    quarter = {text: n * 4 // 1000 for n, text in enumerate(in_file)}
    assert sorted(first) == sorted(second) == sorted(in_file), "every row once an epoch, the tail too"
    assert {quarter[text] for text in first[:400]} == {0, 1, 2, 3}
    assert min(Counter(quarter[text] for text in first[:400]).values()) >= 20
    assert first != second
    assert drawn(training_rows, range(37, 41)) == epochs[37 * 8 : 41 * 8], "a run that goes on"


def _in_file(training_rows: TrainingRows) -> list[dict[str, Any]]:
    texts = training_rows.parts[0].in_order().take_all()
    return [{"input_ids": np.frombuffer(row["input_ids"], np.int64).tolist()} for row in texts]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_streamed_rows_are_those_of_the_cache(ending, tiny_folder, tmp_path):
    source = write(tmp_path, ending, 40).model_copy(update={"limit": 33})
    cached = prepared(source, tiny_folder, tmp_path, cache="memory").training_rows(["mine"])
    training_rows = streamed(source, tiny_folder, tmp_path)
    assert cached.cached
    assert training_rows.count == cached.count == 33
    assert sorted(drawn(training_rows, range(33), batch_size=1)) == sorted(drawn(cached, range(33), batch_size=1))
    ranks = [drawn(training_rows, range(11), batch_size=3, workers=2, rank=rank) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [22, 11]
    assert len(set(sum(ranks, []))) == 33


@pytest.mark.parametrize(("workers", "most"), [(1, 10), (2, 10), (2, 100), (3, 19)])
def test_new_rows_are_distinct_ones_of_all_ranks(workers, most, tiny_folder, tmp_path):
    training_rows = streamed(write(tmp_path, "parquet", 20), tiny_folder, tmp_path)
    layout, new = StepLayout(6, workers, 2), []
    for rank in range(workers):
        with BatchLoader(training_rows, layout=layout, rank=rank, steps=range(5), seed=1, collate=list) as loader:
            for parts in loader:
                for part, count in zip(parts, loader.new_rows(most), strict=True):
                    new += [str(row.input_ids.tolist()) for row in part[:count]]
    assert len(new) == len(set(new)) == min(most, 20)


def test_held_out_rows_are_never_drawn(tiny_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path, "parquet", 120)
    everything = set(drawn(streamed(source, tiny_folder, tmp_path), range(15)))
    learned, held_out = streamed(source, tiny_folder, tmp_path).split(0.2, seed=1)
    assert (learned.count, held_out.count) == (96, 24)
    ids = drawn(learned, range(12))
    batches = distinct_batches(held_out, count=24, micro_batch=5, rank=0, workers=1, seed=0)
    looked_at = {str(row.input_ids.tolist()) for batch in batches if batch is not None for row in batch}
    assert len(set(ids)) == 96
    assert len(looked_at) == 24
    assert set(ids) | looked_at == everything


def test_bad_rows_are_never_drawn(tiny_folder, tmp_path):
    source = write(tmp_path, "parquet", 64, row_group_size=10)
    table = pq.read_table(source.path).to_pylist()
    for n in (0, 9, 10, 63):
        table[n]["answer"] = " "
    pq.write_table(pa.Table.from_pylist(table), source.path, row_group_size=10)
    training_rows = streamed(source, tiny_folder, tmp_path, max_bad_share=0.1)
    assert training_rows.count == 60
    assert len(set(drawn(training_rows, range(60), batch_size=1))) == 60


def test_several_tasks_come_mixed_where_one_of_them_streams(tiny_folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = streamed(write(tmp_path / "one", "parquet", 20), tiny_folder, tmp_path / "one")
    two = streamed(write(tmp_path / "two", "jsonl", 12), tiny_folder, tmp_path / "two")
    both = TrainingRows(one.count + two.count, parts=one.parts + two.parts)
    assert both.count == 32
    assert sorted(drawn(both, range(4))) == sorted(
        drawn(one, range(20), batch_size=1) + drawn(two, range(12), batch_size=1)
    )


def test_distinct_rows_come_from_the_whole_file(tiny_folder, tmp_path):
    training_rows = streamed(write(tmp_path, "parquet", 200, row_group_size=20), tiny_folder, tmp_path)
    in_file = [str(row["input_ids"]) for row in _in_file(training_rows)]
    ranks = [
        list(distinct_batches(training_rows, count=40, micro_batch=8, rank=r, workers=3, seed=1)) for r in range(3)
    ]
    assert {len(rank) for rank in ranks} == {2}
    indices = [in_file.index(str(row.input_ids.tolist())) for rank in ranks for batch in rank if batch for row in batch]
    assert len(indices) == len(set(indices)) == 40
    assert np.histogram(indices, 4, (0, 200))[0].min() >= 4


def test_a_rank_without_rows_gets_one_of_which_nothing_is_learned(tiny_folder, tmp_path):
    training_rows = streamed(write(tmp_path, "parquet", 20), tiny_folder, tmp_path)
    settings: dict[str, Any] = {"steps": range(3), "seed": 0, "collate": partial(collate, pad_token_id=0)}
    with BatchLoader(training_rows, layout=StepLayout(1, 2, 1), rank=1, **settings) as loader:
        steps = list(loader)
    assert [len(step) for step in steps] == [1, 1, 1]
    assert all((batch["labels"] == IGNORED).all() for step in steps for batch in step)


def test_small_row_groups_that_follow_each_other_are_one_piece(tmp_path):
    for name, size in (("a", 10), ("b", 3), ("c", 100)):
        pq.write_table(pa.table({"n": range(100)}), tmp_path / f"{name}.parquet", row_group_size=size)
    paths = [str(file) for file in sorted(tmp_path.glob("*.parquet"))]
    pieces = pieces_of(LocalFileSystem(), paths, rows=32, limit=270)
    assert pieces is not None
    assert pieces.rows.tolist() == [30, 30, 30, 10, 30, 30, 30, 10, 32, 32, 6]
    assert pieces.groups.tolist() == [3, 3, 3, 1, 10, 10, 10, 4, 1, 1, 1]
    assert pieces.file.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    bad = replace(pieces, bad=np.array([0, 31, 269]))
    assert bad.good.tolist() == [29, 29, 30, 10, 30, 30, 30, 10, 32, 32, 5]
    request = bad.some(1, 9).read(0, np.array([0, 1]))
    assert (request.path, request.group, request.number, request.at.tolist()) == (paths[0], 3, 31, [0, 2])
    assert pieces.read(9).at.tolist() == list(range(32, 64))


def test_a_damaged_row_group_costs_its_own_rows_only(tiny_folder, tmp_path):
    source = write(tmp_path, "parquet", 64, row_group_size=8)
    file = Path(source.path)
    offset = pq.read_metadata(file).row_group(2).column(1).data_page_offset
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"\xff" * 16)
    prepared_rows = prepared(source, tiny_folder, tmp_path, max_bad_share=0.2, max_lost_files=1)
    assert prepared_rows.aside["mine"].rows == 8
    rows = prepared_rows.training_rows(["mine"])
    assert len(set(drawn(rows, range(56), batch_size=1))) == rows.count == 56


def test_a_task_that_dies_goes_on_where_it_was(tiny_folder, tmp_path):
    """All rows come, in their order."""
    training_rows = streamed(write(tmp_path, "parquet", 200, row_group_size=20), tiny_folder, tmp_path, shuffle_rows=64)
    expected = drawn(training_rows, range(200))
    rows = []
    with BatchLoader(
        training_rows, layout=StepLayout(8, 1, 8), rank=0, steps=range(200), seed=3, collate=list
    ) as loader:
        for step, batches in enumerate(loader):
            rows += [str(row.input_ids.tolist()) for row in batches[0]]
            if step == 5:
                assert kill_readers()
    assert rows == expected


def kill_readers() -> int:
    """Kills the processes of the tasks that read; returns how many there were."""
    killed = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "_encoded" in " ".join(process.cmdline()[:1]):
                process.kill()
                killed += 1
    return killed


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_files_that_vanish_are_a_clear_error_in_training(ending, tiny_folder, tmp_path):
    training_rows = streamed(write(tmp_path, ending, 20), tiny_folder, tmp_path)
    for file in tmp_path.rglob("*.parquet"):
        file.unlink()
    with pytest.raises(StreamError, match=r"\.parquet.* cannot be read"):
        drawn(training_rows, range(3))


def test_features_that_do_not_fit_the_cache_stream_too(tiny_folder, tmp_path):
    settings: dict[str, Any] = {
        "base": BaseModelConfig(path=str(tiny_folder)), "data_folder": tmp_path, "quarantine": tmp_path, "answer": True,
        "embeds_folder": tmp_path / "features",
    }  # fmt: skip
    part = {"digits": TaskRows(SourceConfig(path="demo://digits/train", limit=24), key="rows")}
    streaming, cached = (
        prepare(part, DataConfig(vision_cache="features", cache=cache), **settings).training_rows(["digits"])
        for cache in ("none", "memory")
    )
    assert not streaming.cached
    assert sorted(drawn(streaming, range(3))) == sorted(drawn(cached, range(3)))


def test_leaving_waits_for_nobody(tiny_folder, tmp_path):
    """Two ranks of unequal speed, left at any moment."""
    training_rows = streamed(write(tmp_path, "parquet", 64, row_group_size=8), tiny_folder, tmp_path)
    for count_taken, other in pairwise((0, 1, 5, 2)):
        loaders = [
            BatchLoader(training_rows, layout=StepLayout(4, 2, 1), rank=rank, steps=range(1000), seed=0, collate=list)
            for rank in range(2)
        ]
        with loaders[0], loaders[1]:
            for loader, count in zip(loaders, (count_taken, other), strict=True):
                for _ in range(count):
                    next(loader)
        for loader in loaders:
            assert loader.ended(0)


def test_readers_that_are_left_end_a_moment_later(tiny_folder, tmp_path, monkeypatch):
    """They stand still, with more rows to read than anybody will take."""
    monkeypatch.setattr(read_ahead, "SETTLING_SECONDS", 2.0)
    training_rows = streamed(write(tmp_path, "parquet", 64, row_group_size=8), tiny_folder, tmp_path)
    before = reading()
    with BatchLoader(
        training_rows, layout=StepLayout(4, 1, 1), rank=0, steps=range(100_000), seed=0, collate=list
    ) as loader:
        next(loader)
        assert until(lambda: reading() - before), "it reads"
        mine = reading() - before
    assert until(lambda: not mine & reading()), "and is gone"


def reading() -> set[str]:
    """Returns the ids of the tasks that read rows now."""
    running = [("name", "=", read_ahead._encoded._function_name.split(".")[-1]), ("state", "=", "RUNNING")]
    return {task.task_id for task in list_tasks(address=connect().address, filters=running)}


def until(true: Callable[[], object], seconds: float = 60.0) -> bool:
    """Waits until something is true; returns whether it has become so."""
    end = time.monotonic() + seconds
    while not (reached := true()) and time.monotonic() < end:
        time.sleep(0.5)
    return bool(reached)
