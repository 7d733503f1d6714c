import io
import json

import numpy as np
import pyarrow.fs as fs
import pytest
from PIL import Image

from pipeline.config import ColumnsConfig
from pipeline.data.rows import conversations
from pipeline.data.rows.records import BadRow, to_record
from pipeline.data.sources.storage import ImageFolder

RED = Image.new("RGB", (8, 6), "red")
MAPPED = ColumnsConfig(id="number", question="q", answer="a", images="picture")


def encoded(image: Image.Image = RED, image_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format)
    return stream.getvalue()


def record(row, columns=ColumnsConfig(), prompt="{question}", folder="/nowhere", **settings):  # noqa: B008 - frozen
    where = ImageFolder(fs.LocalFileSystem(), str(folder))
    return to_record(row, columns, name="unnamed", prompt=prompt, folder=where, **settings)


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation in which user and assistant alternate."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def reason(row, **settings) -> str:
    with pytest.raises(BadRow) as error:
        record(row, **settings)
    return str(error.value)


def test_messages():
    row = {"id": 7, "messages": turns("<image>what ?", "red"), "images": [{"bytes": encoded(), "path": None}]}
    parsed = record(row)
    assert parsed.id == "7"
    assert parsed.messages == turns("<image>what ?", "red")
    assert parsed.reference.answers == ("red",)
    assert parsed.question == "what ?"
    (image,) = parsed.images
    assert (image.mode, image.size) == ("RGB", (8, 6))


def test_the_users_row_is_left_as_it_is():
    row = {"messages": turns("what ?", "red"), "images": [encoded()]}
    record(row, prompt="{question} short .")
    assert row["messages"] == turns("what ?", "red")


def test_text_only_rows_are_normal():
    for images in ({}, {"images": None}, {"images": []}):
        parsed = record({"messages": turns("say red", "red")} | images)
        assert parsed.images == []
        assert parsed.messages[0]["content"] == "say red"
    assert parsed.id == "unnamed"


def test_conversations_of_llava():
    row = {
        "id": "000012",
        "image": encoded(),
        "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}],
    }
    parsed = record(row)
    assert [(m["role"], m["content"]) for m in parsed.messages] == [("user", "<image>\nwhat ?"), ("assistant", "red")]
    assert len(parsed.images) == 1


def test_questions_with_answers():
    parsed = record({"number": 3, "q": "what ?", "a": ["red", "dark red"], "picture": encoded()}, MAPPED)
    assert parsed.id == "3"
    assert parsed.messages == turns("<image>what ?", "red")
    assert parsed.reference.answers == ("red", "dark red")
    assert record({"q": "how many ?", "a": 3}, MAPPED).reference.answers == ("3",)


def test_several_turns_keep_their_order():
    parsed = record(
        {"messages": turns("<image>what ?", "red", "how many ?", "2", system="read"), "images": [encoded()]}
    )
    assert [m["role"] for m in parsed.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert parsed.question == "how many ?"
    assert parsed.reference.answers == ("2",)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF"])
def test_images_come_as_bytes_paths_or_both(tmp_path, image_format):
    file = tmp_path / "pictures" / "red.img"
    file.parent.mkdir()
    file.write_bytes(encoded(image_format=image_format))
    forms = [
        file.read_bytes(), "pictures/red.img", str(file), {"bytes": file.read_bytes(), "path": "elsewhere.png"},
        {"bytes": None, "path": "pictures/red.img"}, [file.read_bytes()], ("pictures/red.img",), [None, str(file)],
    ]  # fmt: skip
    for form in forms:
        (image,) = record({"messages": turns("what ?", "red"), "images": form}, folder=tmp_path).images
        assert image.size == (8, 6)
        assert np.abs(np.asarray(image, int) - (255, 0, 0)).max() < 3


def test_images_without_placeholder_stand_first():
    parsed = record({"messages": turns("what ?", "red", system="read"), "images": [encoded(), encoded()]})
    assert parsed.messages[1]["content"] == "<image><image>what ?"
    assert parsed.messages[0]["content"] == "read"


PLACED = ["<image>what ?", "what <image> ?", "what ? <image>"]


@pytest.mark.parametrize("text", PLACED)
def test_a_placeholder_stays_where_it_is(text):
    parsed = record({"messages": turns(text, "red"), "images": [encoded()]})
    assert parsed.messages[0]["content"] == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>what ?", "<image>Q: what ? short ."),
        ("<image>\nwhat ?", "<image>Q: \nwhat ? short ."),
        ("<image><image>same ?", "<image><image>Q: same ? short ."),
        ("<image>same as <image> ?", "<image>Q: same as <image> ? short ."),
        ("<image>\n<image>\nsame ?", "<image>\n<image>Q: \nsame ? short ."),
        ("is <image> like <image> ?", "Q: is <image> like <image> ? short ."),
        ("no picture {question} ?", "Q: no picture {question} ? short ."),
    ],
)
def test_the_template_goes_around_the_text_after_leading_images(text, expected):
    images = [encoded()] * text.count("<image>")
    parsed = record({"messages": turns(text, "red"), "images": images}, prompt="Q: {question} short .")
    assert parsed.messages[0]["content"] == expected
    assert len(parsed.images) == sum(m["content"].count("<image>") for m in parsed.messages)


def test_the_template_goes_around_the_first_question_only():
    parsed = record({"messages": turns("what ?", "red", "sure ?", "yes", system="read")}, prompt="{question} short .")
    assert [m["content"] for m in parsed.messages] == ["read", "what ? short .", "red", "sure ?", "yes"]


IMAGE = encoded()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "column 'messages' is missing or null (if your columns are named otherwise, set `columns` or a `preset`)"),
        ({"messages": None}, "column 'messages' is missing or null"),
        ({"messages": []}, "no message of the user"),
        ({"messages": turns("what ?")}, "the last message must be the assistant's answer"),
        ({"messages": turns("what ?", "red", "why ?")}, "the last message must be the assistant's answer"),
        ({"messages": turns("what ?", "red")[1:]}, "no message of the user"),
        ({"messages": turns("what ?", " \n")}, "the answer is empty"),
        ({"messages": turns(" \n", "red")}, "the question is empty"),
        ({"messages": turns("<image>\n", "red"), "images": [IMAGE]}, "the question is empty"),
        ({"messages": turns("what ?", "", "why ?", "red")}, "the answer is empty (message 2 of 4)"),
        ({"messages": turns("a", "b")[::-1]}, "the last message must be the assistant's answer"),
        (
            {"messages": turns("a", "b")[1:] + turns("a", "b")},
            "take turns, the user first; found: assistant, user, assis",
        ),
        ({"messages": turns("a", "b")[:1] + turns("a", "b")}, "user and assistant must take turns"),
        ({"messages": turns("a", "b") + turns("a", "b", system="c")}, "user and assistant must take turns"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "unknown role 'tool'; known: system, user, assistant, human, gpt",
        ),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
        ({"messages": [{"role": "user", "content": None}]}, "the user's content is not text"),
        ({"messages": [{"role": "user", "content": 5}]}, "the user's content is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither text nor image, but 'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "neither text nor image, but 'text'"),
        ({"messages": [{"role": "user", "content": ["what ?"]}]}, "neither text nor image, but None"),
        ({"messages": "what ?"}, "is not a list of messages"),
        ({"messages": "[1, 2]"}, "is not a list of messages"),
        ({"messages": ["what ?", "red"]}, "is not a list of messages"),
        ({"conversations": {"from": "human"}}, "column 'conversations' is not a list of messages"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        ({"messages": turns("<image>what ?", "red")}, "1 <image> in the messages, but 0 images"),
        (
            {"messages": turns("<image><image>what ?", "red"), "images": [IMAGE]},
            "2 <image> in the messages, but 1 images",
        ),
        (
            {"messages": turns("<image>what ?", "red"), "images": [IMAGE, IMAGE]},
            "1 <image> in the messages, but 2 images",
        ),
        ({"messages": turns("what ?", "red"), "images": ["none.png"]}, "image file 'none.png' does not exist in"),
        ({"messages": turns("what ?", "red"), "images": [5]}, "an image must be encoded bytes, a path, or a mapping"),
        ({"messages": turns("what ?", "red"), "images": [b"no image"]}, "an image cannot be decoded"),
        ({"messages": turns("what ?\x00", "red")}, "the user's content holds NUL characters"),
        ({"messages": turns("what ?", "red \ud83d")}, "the assistant's content holds half a surrogate pair"),
        ({"messages": turns("caf\udce9 ?", "red")}, "the user's content is not valid UTF-8"),
        (
            {"messages": turns("x" * 1_000_001, "red")},
            "the user's content has 1,000,001 characters, 1,000,000 are read at",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, message, tmp_path):
    assert message in reason(row, folder=tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "red"}, "column 'q' is missing or null"),
        ({"q": float("nan"), "a": "red"}, "column 'q' is missing or null"),
        ({"q": " ", "a": "red"}, "the question is empty"),
        ({"q": ["what ?"], "a": "red"}, "column 'q' holds list where text belongs"),
        ({"q": "what ?"}, "column 'a' is missing or null (a test split, whose answers are not public?)"),
        ({"q": "what ?", "a": None}, "column 'a' is missing or null"),
        ({"q": "what ?", "a": float("nan")}, "column 'a' is missing or null"),
        ({"q": "what ?", "a": float("inf")}, "column 'a' is missing or null"),
        ({"q": "what ?", "a": []}, "column 'a' holds no answer"),
        ({"q": "what ?", "a": ""}, "the answer is empty"),
        ({"q": "what ?", "a": ["", " "]}, "the answer is empty"),
        ({"q": "what ?", "a": [None, float("nan")]}, "column 'a' holds no answer"),
        ({"q": "what ?", "a": [["red"]]}, "column 'a' holds list where text belongs"),
        ({"q": "what ?", "a": "\ud83d"}, "an answer holds half a surrogate pair"),
        ({"q": "what ?", "a": "A", "c": 5}, "column 'c' is neither a mapping nor a list of options"),
        ({"q": "what ?", "a": "A", "c": "red"}, "column 'c' is neither a mapping nor a list of options"),
        ({"q": "what ?", "a": "A", "c": {"A": "\x00"}}, "an option holds NUL characters"),
    ],
)
def test_a_benchmark_row_that_cannot_be_used_says_why(row, message):
    assert message in reason(row, columns=MAPPED.model_copy(update={"choices": "c"}))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, ("3",)), (3.0, ("3",)), (0.5, ("0.5",)), (-1e300, ("-" + "1" + "0" * 300,)), (True, ("True",)),
        (b"caf\xc3\xa9", ("caf\u00e9",)), (["red", None, " "], ("red",)), (("a", "a"), ("a", "a")), ([1, "2"], ("1", "2")),
        ([{"answer": "net", "answer_id": 1}, {"answer": "nets"}], ("net", "nets")),
    ],
)  # fmt: skip
def test_answers_are_texts(value, expected):
    answers = record({"q": "what ?", "a": value}, MAPPED).reference.answers
    assert [a[:3] for a in answers] == [e[:3] for e in expected]
    assert [len(a) for a in answers] == [len(e) for e in expected]


def test_all_of_ten_peoples_answers_are_kept():
    assert record({"q": "what ?", "a": ["red"] * 7 + ["pink"] * 3}, MAPPED).reference.answers.count("red") == 7


def test_what_a_prompt_asks_needs_no_question(tmp_path):
    """A caption beside a file name, as published image folders have it."""
    (tmp_path / "red.png").write_bytes(encoded())
    columns = ColumnsConfig(images="file_name", answer="text")
    parsed = record({"file_name": "red.png", "text": "a red box"}, columns, "Describe it.{question}", tmp_path)
    assert parsed.messages == turns("<image>Describe it.", "a red box")
    message = reason({"file_name": "red.png", "text": "a red box"}, columns=columns, folder=tmp_path)
    assert message == "there is no question: name `columns.question`, or ask one in the task's prompt"


def test_options_and_groups():
    columns = MAPPED.model_copy(update={"choices": "c", "group": "g"})
    for choices in ({"A": "red", "B": 2, "C": None}, ["red", 2.0, None], '["red", "2"]', '{"A": "red", "B": "2"}'):
        reference = record({"q": "what ?", "a": "A", "c": choices, "g": 7}, columns).reference
        assert (reference.choices, reference.group) == ({"A": "red", "B": "2"}, "7")
    for row in ({}, {"c": None, "g": None}):
        reference = record({"q": "what ?", "a": "A"} | row, columns).reference
        assert (reference.choices, reference.group) == ({}, "")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "what is "}, {"type": "image"}, {"type": "text", "text": " ?"}],
        [{"type": "text", "text": "what is <image> ?"}],
    ],
)
def test_contents_may_be_lists_of_parts(content):
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    parsed = record({"messages": messages, "images": [IMAGE]})
    assert parsed.messages == turns("what is <image> ?", "red")


def test_images_may_come_inside_the_messages(tmp_path):
    """They go to their own places, and the images of the column to the others."""
    (tmp_path / "wide.png").write_bytes(encoded(Image.new("RGB", (9, 1))))
    inline = [{"type": "image_url", "image_url": {"url": "wide.png"}}, {"type": "image", "image": "wide.png"}]
    content = [inline[0], {"type": "image"}, {"type": "text", "text": "<image> same ?"}, inline[1]]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    tall = encoded(Image.new("RGB", (1, 9)))
    parsed = record({"messages": messages, "images": [tall, IMAGE]}, folder=tmp_path)
    assert [image.size for image in parsed.images] == [(9, 1), (1, 9), (8, 6), (9, 1)]
    assert parsed.messages[0]["content"] == "<image><image><image> same ?<image>"


def test_messages_may_be_a_json_string_and_roles_of_either_kind():
    for messages in (turns("what ?", "red"), [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]):
        assert record({"messages": json.dumps(messages)}).messages == turns("what ?", "red")
        assert record({"conversations": messages}).messages == turns("what ?", "red")


def test_an_empty_system_message_says_nothing():
    messages = [{"role": "system", "content": ""}, *turns("what ?", "red")]
    assert record({"messages": messages}).messages == turns("what ?", "red")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "unnamed"), (float("nan"), "unnamed"), ("", "unnamed"), (0, "0"), (["a", 1], "['a', 1]"), ("\ud83d", "?"),
        ("x" * 999, "x" * 200), ("a\x00b", "ab"),
    ],
)  # fmt: skip
def test_ids_can_always_be_shown(value, expected):
    assert record({"id": value, "messages": turns("what ?", "red")}).id == expected


def test_missing_images_are_none():
    for images in (None, float("nan"), "", [], [None], [""]):
        assert record({"messages": turns("what ?", "red"), "images": images}).images == []


def test_the_largest_image_is_the_callers_choice():
    row = {"messages": turns("what ?", "red"), "images": [IMAGE]}
    assert "8 x 6 pixels; data.max_pixels allows 40" in reason(row, max_pixels=40)
    assert len(record(row, max_pixels=48).images) == 1


def test_the_longest_text_is_told_of_without_being_shown(monkeypatch):
    monkeypatch.setattr(conversations, "LONGEST_TEXT", 20)
    assert (
        reason({"messages": turns("what ?", "x" * 21)})
        == "the assistant's content has 21 characters, 20 are read at most"
    )


@pytest.mark.parametrize(
    "messages", [turns("<image>what ?"), turns("<image>what ?", "red"), turns("a", "b", "<image>c")]
)
def test_rows_to_be_answered_need_no_answer(messages):
    """And one that is there is not a part of the prompt."""
    parsed = record({"messages": messages, "images": [encoded()]}, answered=False)
    asked = messages if messages[-1]["role"] == "user" else messages[:-1]
    assert parsed.messages == [*asked, {"role": "assistant", "content": ""}]
    assert len(parsed.images) == 1
    for row in ({"q": "what ?"}, {"q": "what ?", "a": None}, {"q": "what ?", "a": "red"}):
        parsed = record(row, ColumnsConfig(question="q", answer="a"), answered=False)
        assert [m["content"] for m in parsed.messages] == ["what ?", ""]
    assert record({"q": "what ?"}, ColumnsConfig(question="q"), answered=False).question == "what ?"


def test_images_of_an_answer_are_left_out_with_it():
    picture = {"type": "image", "image": encoded()}
    answer = {"role": "assistant", "content": [picture, {"type": "text", "text": "that"}]}
    user = {"role": "user", "content": [picture, {"type": "text", "text": "which ?"}]}
    assert len(record({"messages": [user, answer]}, answered=False).images) == 1


def test_rows_to_be_answered_must_ask():
    for messages, why in (([], "no message of the user"), (turns(""), "the question is empty")):
        assert why in reason({"messages": messages}, answered=False)
    assert "column 'q' is missing or null" in reason({"a": "red"}, columns=ColumnsConfig(question="q"), answered=False)
