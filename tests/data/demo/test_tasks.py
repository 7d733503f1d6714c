import hashlib
import io
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.demo import tasks
from pipeline.data.demo.abilities import ABILITIES, BENCHMARKS, vocabulary
from pipeline.data.demo.files import BASE_PROMPT_ROWS, BENCHMARK_ROWS, SCHEMA, demo_file
from pipeline.data.demo.tasks import TASKS
from pipeline.models.tiny import tiny_tokenizer

PARTS = [f"{task}/eval" for task in (*TASKS, *BENCHMARKS)]
PARTS += [f"{task}/train" for task in ("successor", "highest", "digits", "general")]
"""All parts but those training parts that are drawn exactly like their evaluation part, only more of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def rows(folder):
    """Rows by part."""
    return {part: pq.read_table(demo_file(f"demo://{part}", folder)).to_pylist() for part in PARTS}


def content(row) -> tuple[str, str]:
    """What the model gets to see of a row."""
    images = b"".join(image["bytes"] for image in row["images"])
    return row["messages"][0]["content"], hashlib.sha256(images).hexdigest()


@pytest.mark.parametrize("part", PARTS)
def test_files_are_canonical(folder, rows, part):
    assert pq.read_schema(demo_file(f"demo://{part}", folder)).equals(SCHEMA)
    name = part.replace("/", "-")
    for number, row in enumerate(rows[part]):
        assert row["id"] == f"{name}-{number:05d}"
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].count("<image>") == len(row["images"]) <= 1
        assert assistant["content"].strip()
        for image in row["images"]:
            decoded = Image.open(io.BytesIO(image["bytes"]))
            assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "RGB", (64, 64))


def test_parts_have_their_sizes(rows):
    sizes = {part: len(part_rows) for part, part_rows in rows.items()}
    assert sizes.pop("general/train") == BASE_PROMPT_ROWS * len(BENCHMARKS)
    assert {sizes.pop(f"{ability}/eval") for ability in BENCHMARKS} == {BENCHMARK_ROWS}
    assert {size for part, size in sizes.items() if part.endswith("train")} == {tasks.TRAIN_ROWS}
    assert {size for part, size in sizes.items() if part.endswith("eval")} == {tasks.EVAL_ROWS}


def test_text_only_tasks_have_no_images(rows):
    without = {part.split("/")[0] for part, part_rows in rows.items() if not any(r["images"] for r in part_rows)}
    assert without == {"successor", "highest", "repeat", "reverse"}


@pytest.mark.parametrize("part", ["digits/eval", "document/eval", "successor/train"])
def test_files_are_the_same_everywhere(folder, part, tmp_path):
    first, second = (demo_file(f"demo://{part}", directory) for directory in (folder, tmp_path))
    assert first != second
    assert first.read_bytes() == second.read_bytes()
    assert sorted(file.name for file in second.parent.iterdir()) == [second.name, f"{second.name}.lock"]


def _read_at_once(folder) -> bytes:
    return demo_file("demo://clock/eval", folder).read_bytes()


def test_processes_that_need_a_file_at_once_read_the_same_whole_one(folder, tmp_path):
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as processes:
        contents = list(processes.map(_read_at_once, [tmp_path] * 4))
    assert set(contents) == {demo_file("demo://clock/eval", folder).read_bytes()}


def test_a_file_is_written_once(folder, rows):
    file = demo_file("demo://clock/eval", folder)
    before = file.stat().st_mtime_ns
    assert demo_file("demo://clock/eval", folder).stat().st_mtime_ns == before


@pytest.mark.parametrize("path", ["clok/eval", "shape/train", "digits", "digits/test", "general/eval", ""])
def test_unknown_data_are_refused_with_the_known_ones(folder, path):
    with pytest.raises(ValueError, match=rf"demo://{path}: no such demo data; there are: .*clock/eval.*shape/eval"):
        demo_file(f"demo://{path}", folder)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_held_out_is_never_learned(rows, task):
    """Of the training parts as much is drawn as time allows; the text-only tasks and the real digits entirely."""
    if f"{task}/train" in rows:
        learned = {content(row) for row in rows[f"{task}/train"]}
    else:
        examples = [example for example, _ in zip(tasks.examples(task, "train"), range(200), strict=False)]
        learned = {(f"<image>{e.question}", hashlib.sha256(png(e.image)).hexdigest()) for e in examples}
    assert len(learned) > 100
    assert [row["id"] for row in rows[f"{task}/eval"] if content(row) in learned] == []


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def test_handwritten_digits_are_held_out_as_such():
    """Not only other places and sizes: other drawings of other hands."""
    images, labels = tasks._handwriting()
    train, evaluation = images[: tasks.TRAIN_ROWS], images[tasks.TRAIN_ROWS : tasks.TRAIN_ROWS + tasks.EVAL_ROWS]
    assert len(evaluation) == tasks.EVAL_ROWS
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in evaluation)
    assert np.bincount(labels[tasks.TRAIN_ROWS : tasks.TRAIN_ROWS + tasks.EVAL_ROWS]).min() >= 10


def test_base_prompts_are_not_the_evaluated_ones(rows):
    general = {content(row) for row in rows["general/train"]}
    assert len(general) > 0.95 * len(rows["general/train"])
    for ability in BENCHMARKS:
        same = [row for row in rows[f"{ability}/eval"] if content(row) in general]
        assert len(same) <= (2 if ability in ("repeat", "reverse") else 0)  # a short text may come up by chance


@pytest.mark.parametrize("seed", [0, 11, 13])
def test_pretraining_never_draws_a_held_out_picture(rows, seed):
    """Pretraining draws from [seed, step]; even a seed that is one of the held-out seeds gives other pictures."""
    abilities = list(ABILITIES.values())
    drawn = set()
    for step in range(4):
        random = np.random.default_rng([seed, step])
        for number in random.integers(len(abilities), size=64):
            example = abilities[number](random)
            if example.image:
                drawn.add((f"<image>{example.question}", hashlib.sha256(png(example.image)).hexdigest()))
        for ability in abilities:
            example = ability(np.random.default_rng([seed, step]))
            if example.image:
                drawn.add((f"<image>{example.question}", hashlib.sha256(png(example.image)).hexdigest()))
    assert len(drawn) > 200
    held_out = [content(row) for ability in BENCHMARKS for row in rows[f"{ability}/eval"] + rows["general/train"]]
    assert not drawn & set(held_out)


def test_every_word_is_one_token(rows):
    tokenizer = tiny_tokenizer(vocabulary())
    texts = {m["content"].removeprefix("<image>") for part in rows.values() for row in part for m in row["messages"]}
    words = {word for text in texts for word in text.split()}
    assert [word for word in words if tokenizer.tokenize(word) != [word]] == []
    text = next(iter(texts))
    assert tokenizer.tokenize(text) == text.split()


def test_answers_are_short_enough_to_be_generated(rows):
    """The default of evaluation.max_new_tokens is 12, one of them the end."""
    assert max(len(row["messages"][1]["content"].split()) for part in rows.values() for row in part) <= 11


def test_the_vocabulary_has_no_word_twice_and_an_order():
    assert vocabulary() == sorted(set(vocabulary()))


def test_no_answer_dominates(rows):
    for task in TASKS:
        answers = [row["messages"][1]["content"] for row in rows[f"{task}/eval"]]
        assert max(answers.count(answer) for answer in set(answers)) < 0.25 * len(answers)


def test_successors_are_right(rows):
    for row in rows["successor/train"] + rows["successor/eval"]:
        digits = [int(word) for word in row["messages"][0]["content"].split() if word.isdigit()]
        assert [int(word) for word in row["messages"][1]["content"].split()] == [(n + 1) % 10 for n in digits]


def test_clocks_and_later_share_their_pictures_kind_but_not_their_questions(rows):
    questions = {task: {row["messages"][0]["content"] for row in rows[f"{task}/eval"]} for task in ("clock", "later")}
    assert not questions["clock"] & questions["later"]
