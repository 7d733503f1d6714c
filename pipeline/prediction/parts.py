"""The files of answers: parts of a fixed number of rows, each written whole, with the rows that were set aside beside it.

`part-000003.parquet` has the answers to the good rows among the fourth `rows_per_part` rows, `quarantine/part-000003.jsonl`
the others with reasons. A part that is there is done: it appears last, whole. Where the rows after it begin stands in its
own metadata, so going on reads one file, however many there are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.rows.quarantine import NOTES
from pipeline.data.sources.raw_row import NUMBER
from pipeline.errors import stored_file
from pipeline.evaluation.tables import write_table
from pipeline.files import atomic_file
from pipeline.prediction.errors import PredictError

REMEDY = "delete this file, and its rows are answered again"
"""Remedy for a damaged part."""

ANSWERS = pa.schema([
    ("id", pa.string()),
    ("source", pa.string()),
    (NUMBER, pa.int64()),
    ("question", pa.string()),
    ("answer", pa.string()),
    ("expert", pa.string()),
    ("posterior", pa.float64()),
])  # fmt: skip
"""Columns of the answers: `source` and `number` are a row's file and its number there, `posterior` the probability of the
expert by the prompt router, null where the router gives none."""

ASIDE = pa.schema([
    ("reason", pa.string()), ("excerpt", pa.string()), ("rows", pa.int64()), ("lost", pa.string()),
])  # fmt: skip
"""Further columns of an answered page; a row with a `reason` was set aside."""

_KEY = b"pointsman"


@dataclass(frozen=True)
class End:
    """Where a part ends."""

    rows: int
    """Number of its rows, good or bad."""
    source: str
    number: int
    """Place of the last row."""
    same_place: int
    """How many rows at the end of the part have this place: rotations of a question share theirs."""
    lost: tuple[str, ...] = ()
    """Files that could not be read in full."""


@dataclass
class Totals:
    """What the files of a folder hold, counted in them."""

    rows_out: int = 0
    set_aside: int = 0
    by_expert: Counter[str] = field(default_factory=Counter)
    lost_files: set[str] = field(default_factory=set)


class Parts:
    """The parts in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, part: int) -> Path:
        """Returns the file of a part's answers."""
        return self.folder / f"part-{part:06d}.parquet"

    def quarantine(self, part: int) -> Path:
        """Returns the file of the rows that were set aside of a part, which is there only if there are any."""
        return self.folder / "quarantine" / f"part-{part:06d}.jsonl"

    def done(self) -> set[int]:
        """Returns the numbers of the parts that are there; raises PredictError where others have files of such names there."""
        files = {file: re.fullmatch(r"part-(\d{6,})", file.stem) for file in self.folder.glob("part-*.parquet")}
        if others := sorted(file.name for file, match in files.items() if match is None):
            raise PredictError(f"{self.folder}: {others[0]} is none of its answers; choose another folder")
        return {int(match[1]) for match in files.values() if match is not None}

    def end(self, part: int) -> End:
        """Returns where a part ends; raises StoredFileError where it is damaged."""
        with stored_file(self.file(part), REMEDY):
            fields = json.loads(pq.read_metadata(self.file(part)).metadata[_KEY])
            return End(**fields | {"lost": tuple(fields["lost"])})

    def write(self, part: int, table: pa.Table) -> None:
        """Writes a part from the answered rows of all its pages, in order."""
        bad = pc.not_equal(table["reason"], "")
        aside = table.filter(bad).select([*NOTES, NUMBER]).to_pylist()
        if aside:
            with atomic_file(self.quarantine(part)) as staging:
                staging.write_text("".join(json.dumps(entry) + "\n" for entry in aside))
        else:
            self.quarantine(part).unlink(missing_ok=True)
        places = list(zip(table["source"].to_pylist(), table[NUMBER].to_pylist(), strict=True))
        same = next((i for i, place in enumerate(reversed(places)) if place != places[-1]), len(places))
        lost = tuple(sorted({entry["source"] for entry in aside if entry["lost"]}))
        metadata = json.dumps(asdict(End(len(places), *places[-1], same, lost)))
        answers = table.filter(pc.invert(bad)).select(ANSWERS.names).cast(ANSWERS)
        write_table(answers.replace_schema_metadata({_KEY: metadata.encode()}), self.file(part))

    def totals(self) -> Totals:
        """Counts answers, rows that were set aside and files that were lost, from the files themselves."""
        totals = Totals()
        for part in sorted(self.done()):
            with stored_file(self.file(part), REMEDY):
                experts = pq.read_table(self.file(part), columns=["expert"])["expert"]
            totals.rows_out += len(experts)
            totals.by_expert.update(experts.to_pylist())
            totals.set_aside += sum(1 for _ in self._aside(part))
            totals.lost_files.update(self.end(part).lost)
        return totals

    def reasons(self, count: int) -> list[str]:
        """Returns the first reasons why rows were set aside, each with the row."""
        entries = (json.loads(line) for part in sorted(self.done()) for line in self._aside(part))
        return [f"{entry['id'] or 'a row'}: {entry['reason']}" for entry, _ in zip(entries, range(count), strict=False)]

    def _aside(self, part: int) -> Iterator[str]:
        if self.quarantine(part).exists():
            with self.quarantine(part).open() as lines:
                yield from lines
