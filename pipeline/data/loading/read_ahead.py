"""Encoded rows, read ahead by Ray tasks outside the training process.

- Each task reads and encodes its rows, and pauses while `_UNREAD` of its tables wait to be consumed.
- Tasks book no CPUs: a paused task would hold them and starve the other workers' tasks.
- A task that is lost with its process or node, or whose table is lost, is restarted at the next row needed.
- Leaving ends the tasks a moment later; waits check every `POLL_SECONDS` whether to leave.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from pipeline.data.encoded.encoding import encode_batch
from pipeline.data.encoded.packing import PACKED, unpack_row
from pipeline.data.errors import StreamError, first_line
from pipeline.data.loading.drawing import Drawable, Order
from pipeline.data.loading.piece_reader import tables
from pipeline.models.encoding import Encoded

POLL_SECONDS = 0.2

RESTARTS = 3
"""Restarts of a task without a row in between."""

SETTLING_SECONDS = 10.0
"""Seconds from leaving to the cancellation of unfinished tasks. Ray aborts this process if a task ends at the moment at which
it is cancelled (`it != submissible_tasks_.end()`, ray pull request 54527). After this time a task that nobody reads from has
ended, or is paused with `_UNREAD` tables."""

_UNREAD = 2
"""Unconsumed tables of a task in the object store, 32 MB each or the rows of one large image."""

_NEEDED = (*PACKED, "id", "source", "reason")


class LeftError(Exception):
    """The consumer has stopped reading."""


class ReadAhead:
    """Yields rows in their order; use as a context manager.

    At most `tasks` tasks read. Raises LeftError when `left` returns true, StreamError where a row cannot be read any more.
    """

    def __init__(self, source: Drawable, order: Order, *, tasks: int, left: Callable[[], bool]) -> None:
        self._order, self._tasks, self._left = order, order.tasks(tasks), left
        self._source, self._settings = ray.put(source), ray.put(order)
        self._running: dict[int, Any] = {}

    def __enter__(self) -> Iterator[Encoded]:
        return self._rows()

    def __exit__(self, *error: object) -> None:
        tasks = list(self._running.values())
        self._running.clear()
        if tasks:
            here = ray.get_runtime_context().get_node_id()
            threading.Thread(target=_end, args=(tasks, here), name="ending readers", daemon=True).start()

    def _rows(self) -> Iterator[Encoded]:
        for task in range(self._tasks):
            self._start(task, 0)
        unpacked: dict[int, Iterator[Encoded]] = {}
        for position, task in enumerate(self._order.turns(self._tasks)):
            row = next(unpacked[task], None) if task in unpacked else None
            if row is None:
                unpacked.pop(task, None)  # gives the table's memory back
                unpacked[task] = _unpacked(self._table(task, position))
                row = next(unpacked[task])
            yield row

    def _start(self, task: int, first: int) -> None:
        self._running[task] = _encoded.remote(self._source, self._settings, task, self._tasks, first)

    def _table(self, task: int, position: int) -> pa.Table:
        """Returns the next table of a task, which begins with row `place`."""
        for restarts in range(RESTARTS + 1):
            try:
                return self._got(self._running[task])
            except RayTaskError as error:
                raise StreamError(f"rows cannot be read: {first_line(error.cause)}") from error
            except RayError as error:
                if restarts == RESTARTS:
                    raise StreamError(
                        f"rows cannot be read: the task that reads them was lost {RESTARTS + 1} times (out of memory?): "
                        f"{first_line(error)}"
                    ) from error
                self._start(task, position)
        raise AssertionError

    def _got(self, running: Any) -> pa.Table:
        while not ray.wait([running], timeout=POLL_SECONDS)[0]:
            self._check()
        table = next(running)
        while True:
            self._check()
            try:
                return ray.get(table, timeout=POLL_SECONDS)
            except GetTimeoutError:
                continue

    def _check(self) -> None:
        if self._left():
            raise LeftError


def _end(tasks: list[Any], node: str) -> None:
    """Cancels unfinished tasks after `SETTLING_SECONDS`; `node` is the one on which this runs."""
    time.sleep(SETTLING_SECONDS)
    with suppress(Exception):  # Ray is gone, and they with it
        for task in tasks:
            if not ray.is_initialized() or ray.get_runtime_context().get_node_id() != node:
                return
            if not ray.wait([task.completed()], timeout=0)[0]:
                ray.cancel(task)


def _unpacked(table: pa.Table) -> Iterator[Encoded]:
    for i in range(len(table)):
        if reason := table["reason"][i].as_py():
            where = f"{table['source'][i].as_py()}: row {table['id'][i].as_py()}"
            raise StreamError(f"{where} could be read before training, and cannot any more: {reason}")
        yield unpack_row(*(table[name][i].as_buffer() for name in PACKED))


# Without Ray's own retries: they would begin with the first row of the stage.
@ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD", _generator_backpressure_num_objects=_UNREAD)
def _encoded(source: Drawable, order: Order, task: int, tasks: int, first: int) -> Iterator[pa.Table]:
    rows = tables(order.rows(source, task, tasks, first))
    if source.parts[0].origin.contents == "encoded":
        for table in rows:
            yield table.select(_NEEDED)
        return
    encoders = [part.origin.encoder for part in source.parts]
    for table in rows:
        for columns in encode_batch(table, encoders=encoders):
            yield pa.table({name: columns[name] for name in _NEEDED})
