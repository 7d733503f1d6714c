"""What a worker's feed yields: rows drawn from blocks, every row once an epoch. Streamed rows: see `test_preprocess`."""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.models.prompts import IGNORED, Encoded, collate
from pipeline.streams.feed import Feed
from pipeline.streams.packing import pack

ROWS, PAD = 23, 7


def row(number: int) -> Encoded:
    """Row `number`: its first token names it; lengths differ, every third row has no image."""
    ids = np.arange(1 + number % 4, dtype=np.int64) + 100 * (number + 1)
    labels = np.where(ids % 2, ids, IGNORED)
    pixels = {"pixel_values": np.full((number % 3, 3, 2, 2), number, np.float32)} if number % 3 else {}
    return Encoded(ids, labels, pixels)


class Shard:
    """Rows that lie in blocks of different sizes."""

    def __init__(self, rows: int = ROWS, cuts: tuple[int, ...] = (4, 5, 15)) -> None:
        packed = [pack(row(n)) for n in range(rows)]
        table = pa.table({name: [columns[name] for columns in packed] for name in pack(row(0))})
        edges = [0, *(cut for cut in cuts if cut < rows), rows]
        self.blocks = [table.slice(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
        self.read = 0

    def iter_batches(self, *, batch_size: None, batch_format: str) -> Iterator[pa.Table]:
        assert batch_format == "pyarrow"
        self.read += 1
        yield from self.blocks


def feed(shard: Shard, *, batch_size: int = 4, seed: int = 5, skip: int = 0) -> Feed:
    return Feed(
        shard, batch_size=batch_size, collate=partial(collate, pad_token_id=PAD), seed=seed, cached=True, skip=skip
    )


def fill(found: Feed) -> None:
    """Waits until the reader waits for room."""
    while not found._ready.full() and found._thread.is_alive():
        found._thread.join(0.01)


def batches(count: int, *, rows: int = ROWS, **settings: int) -> list[dict[str, torch.Tensor]]:
    with feed(Shard(rows), **settings) as found:
        return [next(found) for _ in range(count)]


def numbers(found: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """Returns which rows stand in each batch."""
    return [(batch["input_ids"][:, 0] // 100 - 1).tolist() for batch in found]


def test_every_row_comes_once_an_epoch_up_to_the_dropped_tail():
    for start in (0, 5, 10):  # three epochs of 23 rows in batches of 4
        epoch = sum(numbers(batches(15)[start : start + 5]), [])
        assert len(set(epoch)) == len(epoch) == 20
        assert set(epoch) < set(range(ROWS))


def test_no_row_is_left_out_for_good():
    seen = Counter(sum(numbers(batches(100)), []))
    assert set(seen) == set(range(ROWS))
    assert max(seen.values()) == 20  # as many as there were epochs


def test_a_batch_as_large_as_the_shard_is_all_of_it():
    for found in numbers(batches(3, batch_size=ROWS)):
        assert sorted(found) == list(range(ROWS))


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


def test_batches_of_similar_length_hold_every_row_once():
    def epoch(**settings):
        feed = Feed(Shard(96), batch_size=8, collate=list, seed=3, cached=True, **settings)
        with feed:
            return [[len(row.input_ids) for row in next(feed)] for _ in range(12)]

    def padding(batches):
        return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches)

    plain, grouped = epoch(), epoch(by_length=True)
    assert sorted(sum(plain, [])) == sorted(sum(grouped, []))
    assert padding(grouped) < padding(plain) / 3
    assert grouped == epoch(by_length=True)
    assert grouped != sorted(grouped), "batches come in random order"


def test_rows_without_any_image():
    (batch,) = batches(1, rows=1, batch_size=1)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_the_next_epoch_has_another_order():
    found = numbers(batches(2, batch_size=ROWS))
    assert found[0] != found[1]
    assert found[0] != list(range(ROWS))


def test_the_same_seed_gives_the_same_batches():
    first, again, other = (numbers(batches(12, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_the_order_does_not_depend_on_the_blocks():
    expected = numbers(batches(12))
    with feed(Shard(cuts=(11,))) as found:
        assert numbers([next(found) for _ in range(12)]) == expected


@pytest.mark.parametrize("skip", [1, 4, 5, 6, 13])
def test_skipping_goes_on_where_a_run_without_it_would_be(skip):
    """Within an epoch, at its end and in a later one."""
    whole, rest = batches(skip + 7), batches(7, skip=skip)
    for expected, found in zip(whole[skip:], rest, strict=True):
        assert expected.keys() == found.keys()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_rows_are_read_from_the_shard_once():
    shard = Shard()
    with feed(shard) as found:
        for _ in range(30):
            next(found)
    assert shard.read == 1


@pytest.mark.parametrize("rows", [1, 3])
def test_too_few_rows_for_a_batch_are_refused(rows):
    with feed(Shard(rows)) as found, pytest.raises(ValueError, match="holds fewer rows than its batch of 4"):
        next(found)


class Broken(Shard):
    """A shard whose second block is lost."""

    def iter_batches(self, *, batch_size: None, batch_format: str) -> Iterator[pa.Table]:
        yield self.blocks[0]
        raise ConnectionError("the object store is gone")


def test_an_error_in_the_reader_reaches_the_training_thread():
    with feed(Broken()) as found, pytest.raises(ConnectionError, match="the object store is gone"):
        next(found)
    assert not found._thread.is_alive()


def test_leaving_ends_the_reader_whatever_is_unread():
    with feed(Shard()) as found:
        next(found)
        assert found._thread.is_alive()
        fill(found)
    assert not found._thread.is_alive()


def test_an_error_in_training_ends_the_reader_too():
    with pytest.raises(KeyError), feed(Shard()) as found:
        raise KeyError
    assert not found._thread.is_alive()


def test_waiting_is_measured():
    """The first batch has to be waited for; those that lie ready have not."""
    with feed(Shard()) as found:
        assert found.wait_seconds == 0
        next(found)
        first = found.wait_seconds
        assert first > 0
        fill(found)
        next(found)
        assert found.wait_seconds - first < 0.5
