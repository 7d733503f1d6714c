"""Store of generated answers, shared by all runs of an output folder: each answer is generated once.

An answer depends on the base, the prompt, the generation settings and its author: the base, one expert, or a pool whose
Linears mix several. A store is the folder of one base and one setting. Each author has a folder of parquet files with
`prompt` (digest of the encoded row), `answer` and `expert`. Files are written atomically and never changed, so any number
of processes may write; of two answers to a prompt the one read first counts. A reader compacts an author's files when they
are many. Independent of models and pools.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import stored_file
from pipeline.evaluation.tables import write_table
from pipeline.locks import LockedError, file_lock

MANY = 32
"""Files of an author from which on they are compacted."""
KEPT_SECONDS = 10.0
"""Seconds for which answers are buffered before they are written; a kill may lose them."""
REMEDY = "delete this file, and its answers are generated again"
"""Remedy for a damaged file of answers."""

Pull = Callable[[Path, str], None]
"""Brings a file or folder of this name in a folder, if it lies elsewhere."""

_SCHEMA = pa.schema([("prompt", pa.string()), ("answer", pa.string()), ("expert", pa.string())])

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A generated text, and the expert with the largest share in it (or `base`)."""

    text: str
    expert: str


def pool_author(key: str) -> str:
    """Returns the author's name of the pool `key`, for answers that its Linears mix."""
    return f"pool-{key}"


class AnswerStore:
    """Answers of one base under one setting of generation; `pull` brings an author's that lie elsewhere."""

    def __init__(self, folder: Path, pull: Pull = lambda folder, name: None) -> None:
        self.folder, self._pull = folder, pull
        self._answers: dict[str, dict[str, Answer]] = {}
        self._read_files: dict[str, set[str]] = {}
        self._unwritten: dict[str, dict[str, Answer]] = {}
        self._since = monotonic()

    def of(self, author: str, wanted: Iterable[str]) -> Mapping[str, Answer]:
        """Returns an author's answers by prompt; reads new files if one of `wanted` is missing."""
        answers = self._answers.setdefault(author, {})
        if any(prompt not in answers for prompt in wanted):
            self._refresh(author)
        return answers

    def _refresh(self, author: str) -> None:
        """Reads files that any process has written since the last time."""
        answers, read_files = self._answers[author], self._read_files.setdefault(author, set())
        self._pull(self.folder, author)
        while True:
            files = sorted(file for file in (self.folder / author).glob("*.parquet") if not file.name.startswith("."))
            try:
                for file in files:
                    if file.name not in read_files:
                        for prompt, answer in _rows(file):
                            answers.setdefault(prompt, answer)
                        read_files.add(file.name)
            except FileNotFoundError:  # compacted meanwhile
                continue
            break
        if len(files) >= MANY:
            self._compact(author, files)

    def add(self, author: str, answers: Mapping[str, Answer]) -> int:
        """Stores answers by prompt, and returns how many are new; `flush` writes them at once."""
        stored = self._answers.setdefault(author, {})
        new = {prompt: answer for prompt, answer in answers.items() if prompt not in stored}
        stored |= new
        self._unwritten.setdefault(author, {}).update(new)
        if monotonic() - self._since > KEPT_SECONDS:
            self.flush()
        return len(new)

    def flush(self) -> None:
        """Writes buffered answers: one file per author."""
        for author, answers in self._unwritten.items():
            if answers:
                self._write(author, answers)
        self._unwritten.clear()
        self._since = monotonic()

    def _write(self, author: str, answers: Mapping[str, Answer]) -> None:
        rows = [{"prompt": prompt, "answer": a.text, "expert": a.expert} for prompt, a in answers.items()]
        self._pull(self.folder, author)
        file = self.folder / author / f"{uuid4().hex}.parquet"
        write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
        self._read_files.setdefault(author, set()).add(file.name)

    def _compact(self, author: str, files: Iterable[Path]) -> None:
        """Writes all answers of an author into one file and removes the files that they were read from."""
        folder = self.folder / author
        with suppress(LockedError), file_lock(folder / "compact.lock", wait=False):
            self._write(author, self._answers[author])
            for file in files:
                file.unlink(missing_ok=True)
            _logger.info("%s: files of answers compacted", folder)


def _rows(file: Path) -> Iterable[tuple[str, Answer]]:
    with file.open("rb") as opened, stored_file(file, REMEDY):
        table = pq.read_table(opened)
        columns = (table[name].to_pylist() for name in _SCHEMA.names)
        return [(prompt, Answer(text, expert)) for prompt, text, expert in zip(*columns, strict=True)]
