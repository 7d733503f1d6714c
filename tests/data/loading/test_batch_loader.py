"""What a worker's loader yields of rows in the object store. Rows that stream: see `test_streamed_rows`."""

from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from cluster.local import connect
from pipeline.data.encoded.packing import pack
from pipeline.data.loading.batch_loader import BatchLoader, StepLayout, distinct_batches
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.models.encoding import IGNORED, Encoded, collate

pytestmark = pytest.mark.ray

ROWS, PAD = 23, 7


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    connect()


def row(number: int) -> Encoded:
    """Row `number`: its first token names it; lengths differ, every third row has no image."""
    ids = np.arange(1 + number % 4, dtype=np.int64) + 100 * (number + 1)
    labels = np.where(ids % 2, ids, IGNORED)
    pixels = {"pixel_values": np.full((number % 3, 3, 2, 2), number, np.float32)} if number % 3 else {}
    return Encoded(ids, labels, pixels)


def cached(rows: int = ROWS, cuts: tuple[int, ...] = (4, 5, 15)) -> TrainingRows:
    """Rows that lie in blocks of different sizes."""
    packed = [pack(row(n)) for n in range(rows)]
    table = pa.table({name: [columns[name] for columns in packed] for name in pack(row(0))})
    edges = [0, *(cut for cut in cuts if cut < rows), rows]
    return TrainingRows(rows, tuple(ray.put(table.slice(a, b - a)) for a, b in zip(edges, edges[1:], strict=False)))


def loader(
    rows: TrainingRows,
    steps: range,
    *,
    batch_size: int = 4,
    workers: int = 1,
    micro_batch: int | None = None,
    rank: int = 0,
    seed: int = 5,
    **settings: bool,
) -> BatchLoader:
    layout = StepLayout(batch_size, workers, micro_batch or batch_size)
    by_pad = partial(collate, pad_token_id=PAD)
    return BatchLoader(rows, layout=layout, rank=rank, steps=steps, seed=seed, collate=by_pad, **settings)


@pytest.mark.parametrize("workers", [1, 3])
def test_held_out_rows_are_never_learned(workers: int) -> None:
    learned, held_out = cached().split(0.3, seed=1)
    assert (learned.count, held_out.count) == (16, 7)
    drawn: Counter[int] = Counter()
    for rank in range(workers):
        with loader(learned, range(4), workers=workers, rank=rank) as steps:
            drawn.update(
                int(first) // 100 - 1 for step in steps for batch in step for first in batch["input_ids"][:, 0]
            )
    parts = [
        [row.input_ids[0] // 100 - 1 for batch in batches if batch is not None for row in batch]
        for rank in range(workers)
        for batches in [distinct_batches(held_out, count=7, micro_batch=2, rank=rank, workers=workers, seed=0)]
    ]
    looked_at = {int(number) for part in parts for number in part}
    assert len(looked_at) == 7
    assert set(drawn) == set(range(ROWS)) - looked_at, "each of the others once an epoch"
    assert set(drawn.values()) == {1}


def fill(batch_loader: BatchLoader) -> None:
    """Waits until the reader waits for room."""
    while not batch_loader._ready.full() and batch_loader._thread.is_alive():
        batch_loader._thread.join(0.01)


def batches(count: int, *, rows: int = ROWS, start: int = 0, **settings: int) -> list[dict[str, torch.Tensor]]:
    with loader(cached(rows), range(start, start + count), **settings) as steps:
        return [batch for step in steps for batch in step]


def numbers(batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Returns which rows stand in each batch."""
    return [(batch["input_ids"][:, 0] // 100 - 1).tolist() for batch in batches]


@pytest.mark.parametrize(
    ("batch_size", "workers", "micro_batch"), [(16, 1, 16), (16, 6, 3), (16, 6, 1), (3, 2, 1), (7, 4, 2), (2, 5, 1)]
)
def test_every_row_of_a_step_has_one_place(batch_size: int, workers: int, micro_batch: int) -> None:
    layout = StepLayout(batch_size, workers, micro_batch)
    shares = [layout.share(rank) for rank in range(workers)]
    assert all(len(share) == layout.accumulation for share in shares)
    assert [p for share in shares for part in share for p in part] == list(range(batch_size))
    sizes = [len(part) for share in shares for part in share]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= micro_batch


def test_every_row_comes_once_an_epoch_and_none_is_dropped():
    drawn = sum(numbers(batches(ROWS)), [])  # 4 epochs of 23 rows in steps of 4
    for start in range(0, len(drawn), ROWS):
        assert sorted(drawn[start : start + ROWS]) == list(range(ROWS))
    assert drawn[:ROWS] != drawn[ROWS : 2 * ROWS]


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 1), (1, 3), (2, 2), (3, 1), (6, 4)])
def test_a_step_holds_the_same_rows_for_any_workers_and_micro_batches(workers: int, micro_batch: int) -> None:
    expected = numbers(batches(9, batch_size=6))
    actual: list[list[int]] = [[] for _ in expected]
    for rank in range(workers):
        settings = {"batch_size": 6, "workers": workers, "micro_batch": micro_batch, "rank": rank}
        with loader(cached(), range(9), **settings) as ranks:
            for step, parts in enumerate(ranks):
                actual[step] += sum(numbers(parts), [])
    assert actual == expected


def test_a_micro_batch_without_rows_is_one_row_of_the_step_unlabelled():
    (first, empty) = batches(1, batch_size=3, workers=2, micro_batch=1, rank=1)
    assert (empty["labels"] == IGNORED).all()
    assert numbers([empty])[0][0] in sum(numbers(batches(1, batch_size=3)), [])
    assert numbers([first]) != numbers([empty])


@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 6), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("most", [2, 10, 100])
def test_new_rows_are_the_first_of_an_epoch(workers: int, micro_batch: int, most: int) -> None:
    """Up to the last of them, in the middle of a step; a micro-batch without rows has none."""
    drawn = sum(numbers(batches(5, batch_size=6)), [])
    new_numbers = []
    for rank in range(workers):
        settings = {"batch_size": 6, "workers": workers, "micro_batch": micro_batch, "rank": rank}
        with loader(cached(), range(5), **settings) as ranks:
            for parts in ranks:
                for part, count in zip(numbers(parts), ranks.new_rows(most), strict=True):
                    new_numbers += part[:count]
    assert sorted(new_numbers) == sorted(drawn[: min(most, ROWS)])


def test_fewer_rows_than_a_step_come_again_within_it():
    assert Counter(sum(numbers(batches(1, rows=3)), [])).most_common(1)[0][1] == 2


def test_rows_are_collated_as_they_were_packed():
    for batch in batches(10):
        tiles = []
        for ids_T, labels_T, mask_T in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            expected = row(int(ids_T[0]) // 100 - 1)
            length = len(expected.input_ids)
            assert ids_T.tolist() == [*expected.input_ids, *[PAD] * (len(ids_T) - length)]
            assert labels_T.tolist() == [*expected.labels, *[IGNORED] * (len(ids_T) - length)]
            assert mask_T.tolist() == [1] * length + [0] * (len(ids_T) - length)
            tiles += list(expected.images.values())
        if tiles:
            assert batch["pixel_values"].numpy().tolist() == np.concatenate(tiles).tolist()
        assert bool(tiles) == ("pixel_values" in batch)


@pytest.mark.parametrize("rows", [96, 100])
def test_steps_of_similar_length_hold_every_row_once(rows):
    def lengths(**settings):
        settings |= {"rows": rows, "batch_size": 8, "seed": 3}
        return [batch["attention_mask"].sum(1).tolist() for batch in batches(rows // 4, **settings)]

    def padding(batches):
        return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches)

    plain, grouped = lengths(), lengths(group_by_length=True)
    drawn = sum(numbers(batches(rows // 4, rows=rows, batch_size=8, group_by_length=True)), [])
    assert all(sorted(drawn[start : start + rows]) == list(range(rows)) for start in (0, rows))
    assert padding(grouped) < padding(plain) / 2
    assert grouped == lengths(group_by_length=True)
    assert grouped != sorted(grouped), "steps come in random order"


def test_rows_without_any_image():
    (batch,) = batches(1, rows=1, batch_size=1)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_the_same_seed_gives_the_same_batches():
    first, again, other = (numbers(batches(12, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_the_order_does_not_depend_on_the_blocks():
    with loader(cached(cuts=(11,)), range(12)) as steps:
        assert numbers([batch for batches in steps for batch in batches]) == numbers(batches(12))


@pytest.mark.parametrize("start", [1, 4, 5, 6, 13])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_later_start_gives_what_a_run_from_the_beginning_would(start, group_by_length):
    """Within an epoch, at its end and in a later one."""
    settings = {"group_by_length": group_by_length}
    full, rest = batches(start + 7, **settings), batches(7, start=start, **settings)
    assert len(rest) == 7
    for expected, actual in zip(full[start:], rest, strict=True):
        assert expected.keys() == actual.keys()
        assert all(actual[name].equal(tensor) for name, tensor in expected.items())


def test_an_error_in_the_reader_reaches_the_training_thread():
    rows = TrainingRows(1, (ray.put(pa.table({"input_ids": [b"1"]})),))
    with loader(rows, range(3)) as batch_loader, pytest.raises(KeyError, match="labels"):
        next(batch_loader)
    assert not batch_loader._thread.is_alive()


def test_leaving_ends_the_reader_whatever_is_unread():
    with loader(cached(), range(1000)) as batch_loader:
        next(batch_loader)
        assert batch_loader._thread.is_alive()
        fill(batch_loader)
    assert not batch_loader._thread.is_alive()


def test_an_error_in_training_ends_the_reader_too():
    with pytest.raises(KeyError), loader(cached(), range(1000)) as batch_loader:
        raise KeyError
    assert not batch_loader._thread.is_alive()


def test_waiting_is_measured():
    """The first batch has to be waited for; those that lie ready have not."""
    with loader(cached(), range(100)) as batch_loader:
        assert batch_loader.wait_seconds == 0
        next(batch_loader)
        first = batch_loader.wait_seconds
        assert first > 0
        fill(batch_loader)
        next(batch_loader)
        assert batch_loader.wait_seconds - first < 0.5


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_distinct_rows_come_once_in_equally_many_batches(workers):
    def drawn(count: int, seed: int = 0) -> list[int]:
        ranks = [
            list(
                distinct_batches(
                    cached(), count=count, micro_batch=4, rank=rank, workers=workers, seed=seed
                )
            )
            for rank in range(workers)
        ]  # fmt: skip
        assert len({len(rank) for rank in ranks}) == 1
        batches = [collate(part, pad_token_id=PAD) for rank in ranks for part in rank if part is not None]
        return sorted(n for part in numbers(batches) for n in part)

    assert drawn(100) == list(range(ROWS))
    assert len(set(drawn(10))) == 10
    assert max(drawn(10)) > 12, "not the head"
    assert drawn(10) != drawn(10, seed=1)
