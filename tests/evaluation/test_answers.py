"""The store of answers: several writers, kills, many files, damage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import StoredFileError
from pipeline.evaluation import answers
from pipeline.evaluation.answers import Answer, AnswerStore

ROOT = Path(__file__).parents[2]


def some(first: int, last: int) -> dict[str, Answer]:
    return {f"p{n}": Answer(str(n), "base") for n in range(first, last)}


def test_what_is_added_is_known_at_once_and_to_others_after_a_flush(tmp_path: Path) -> None:
    one, other = AnswerStore(tmp_path), AnswerStore(tmp_path)
    assert one.add("base", some(0, 3)) == 3
    assert one.add("base", some(2, 5)) == 2
    assert one.of("base", ["p4"]) == some(0, 5)
    assert other.of("base", ["p4"]) == {}
    one.flush()
    assert other.of("base", ["p4"]) == AnswerStore(tmp_path).of("base", ["p4"]) == some(0, 5)


def test_authors_do_not_mix(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.add("base", some(0, 2))
    store.add("expert", {"p0": Answer("other", "task")})
    store.flush()
    again = AnswerStore(tmp_path)
    assert again.of("expert", ["p0"]) == {"p0": Answer("other", "task")}
    assert again.of("base", ["p0"]) == some(0, 2)


def test_the_answer_that_was_read_first_stays(tmp_path: Path) -> None:
    one, other = AnswerStore(tmp_path), AnswerStore(tmp_path)
    one.add("base", {"p": Answer("first", "base")})
    one.flush()
    other.add("base", {"p": Answer("second", "base")})
    other.flush()
    assert one.of("base", ["new"])["p"].text == "first"


def test_many_files_become_one_under_the_eyes_of_readers(tmp_path: Path) -> None:
    writer, reader = AnswerStore(tmp_path), AnswerStore(tmp_path)
    for n in range(answers.MANY + 3):
        writer.add("base", some(n, n + 1))
        writer.flush()
    half = AnswerStore(tmp_path)
    half.of("base", ["p0"])  # puts them together
    assert len(list((tmp_path / "base").glob("*.parquet"))) == 1
    writer.add("base", some(100, 101))
    writer.flush()
    expected = some(0, answers.MANY + 3) | some(100, 101)
    assert reader.of("base", ["p0"]) == expected
    assert half.of("base", ["p100"]) == expected


def test_a_folder_is_looked_into_only_where_something_is_missing(tmp_path: Path) -> None:
    store, other = AnswerStore(tmp_path), AnswerStore(tmp_path)
    store.add("base", some(0, 1))
    other.add("base", some(1, 2))
    other.flush()
    assert "p1" not in store.of("base", ["p0"])
    assert "p1" in store.of("base", ["p1"])


WRITER = """
import sys
from pathlib import Path
from pipeline.evaluation import answers
answers.KEPT_SECONDS, answers.MANY = 0.0, 4
store = answers.AnswerStore(Path(sys.argv[1]))
for n in range(int(sys.argv[2]), 10**6):
    store.add("base", {f"p{n}": answers.Answer(str(n), "base")})
    store.of("base", ["none"])
"""


def test_writers_that_are_killed_leave_whole_files(tmp_path: Path) -> None:
    """Two processes write, read and put files together at the same time, and are killed."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(first)], cwd=ROOT) for first in (0, 500_000)]
    deadline = time.monotonic() + 60
    seen: dict[str, Answer] = {}
    try:
        while sum(prompt >= "p5" for prompt in seen) < 30 or sum(prompt < "p5" for prompt in seen) < 30:
            assert all(writer.poll() is None for writer in writers)
            assert time.monotonic() < deadline
            answers = AnswerStore(tmp_path).of("base", ["none"])
            assert seen.keys() <= answers.keys()  # nothing is lost while files are put together
            seen = dict(answers)
    finally:
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
    answers = AnswerStore(tmp_path).of("base", ["none"])
    assert seen.keys() <= answers.keys()
    assert all(answer == Answer(prompt[1:], "base") for prompt, answer in answers.items())


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.add("base", some(0, 100))
    store.flush()
    (file,) = (tmp_path / "base").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(StoredFileError, match=f"{file.name}.*delete this file, and its answers are generated again"):
        AnswerStore(tmp_path).of("base", ["p0"])
