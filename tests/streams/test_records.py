import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.config import ColumnsConfig
from pipeline.streams.records import BadRow, parse_line, to_record

RED = Image.new("RGB", (8, 6), "red")
MAPPED = ColumnsConfig(id="number", question="q", answer="a", images="picture")


def encoded(image: Image.Image = RED, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def record(row, columns=ColumnsConfig(), prompt="{question}", folder=None):  # noqa: B008 - frozen
    return to_record(row, columns, name="unnamed", prompt=prompt, folder=folder)


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
    found = record(row)
    assert found.id == "7"
    assert found.messages == turns("<image>what ?", "red")
    assert found.answers == ["red"]
    assert found.question == "what ?"
    (image,) = found.images
    assert (image.mode, image.size) == ("RGB", (8, 6))


def test_the_users_row_is_left_as_it_is():
    row = {"messages": turns("what ?", "red"), "images": [encoded()]}
    record(row, prompt="{question} short .")
    assert row["messages"] == turns("what ?", "red")


def test_text_only_rows_are_normal():
    for images in ({}, {"images": None}, {"images": []}):
        found = record({"messages": turns("say red", "red")} | images)
        assert found.images == []
        assert found.messages[0]["content"] == "say red"
    assert found.id == "unnamed"


def test_conversations_of_llava():
    row = {
        "id": "000012",
        "image": encoded(),
        "conversations": [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}],
    }
    found = record(row)
    assert [(m["role"], m["content"]) for m in found.messages] == [("user", "<image>\nwhat ?"), ("assistant", "red")]
    assert len(found.images) == 1


def test_questions_with_answers():
    found = record({"number": 3, "q": "what ?", "a": ["red", "dark red"], "picture": encoded()}, MAPPED)
    assert found.id == "3"
    assert found.messages == turns("<image>what ?", "red")
    assert found.answers == ["red", "dark red"]
    assert record({"q": "how many ?", "a": 3}, MAPPED).answers == ["3"]


def test_several_turns_keep_their_order():
    found = record({"messages": turns("<image>what ?", "red", "how many ?", "2", system="read"), "images": [encoded()]})
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert found.question == "how many ?"
    assert found.answers == ["2"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_images_come_as_bytes_paths_or_both(tmp_path, kind):
    file = tmp_path / "pictures" / "red.img"
    file.parent.mkdir()
    file.write_bytes(encoded(kind=kind))
    forms = [
        file.read_bytes(), "pictures/red.img", str(file), {"bytes": file.read_bytes(), "path": "elsewhere.png"},
        {"bytes": None, "path": "pictures/red.img"}, [file.read_bytes()], ("pictures/red.img",), [None, str(file)],
    ]  # fmt: skip
    for form in forms:
        (image,) = record({"messages": turns("what ?", "red"), "images": form}, folder=tmp_path).images
        assert image.size == (8, 6)
        assert np.abs(np.asarray(image, int) - (255, 0, 0)).max() < 3


def test_grey_and_transparent_images_become_rgb():
    images = [Image.new("L", (4, 4), 9), Image.new("RGBA", (4, 4)), Image.new("1", (4, 4)), Image.new("P", (4, 4))]
    row = {"messages": turns("what ?", "red"), "images": [encoded(image) for image in images]}
    assert {image.mode for image in record(row).images} == {"RGB"}


def test_images_without_placeholder_stand_first():
    found = record({"messages": turns("what ?", "red", system="read"), "images": [encoded(), encoded()]})
    assert found.messages[1]["content"] == "<image><image>what ?"
    assert found.messages[0]["content"] == "read"


NOISE = encoded(Image.effect_noise((16, 16), 50))
PLACED = ["<image>what ?", "what <image> ?", "what ? <image>"]


@pytest.mark.parametrize("text", PLACED)
def test_a_placeholder_stays_where_it_is(text):
    found = record({"messages": turns(text, "red"), "images": [encoded()]})
    assert found.messages[0]["content"] == text


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
    found = record({"messages": turns(text, "red"), "images": images}, prompt="Q: {question} short .")
    assert found.messages[0]["content"] == expected
    assert len(found.images) == sum(m["content"].count("<image>") for m in found.messages)


def test_the_template_goes_around_the_first_question_only():
    found = record({"messages": turns("what ?", "red", "sure ?", "yes", system="read")}, prompt="{question} short .")
    assert [m["content"] for m in found.messages] == ["read", "what ? short .", "red", "sure ?", "yes"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "no column 'messages' (map `columns` in the task if yours is named otherwise)"),
        ({"messages": None}, "no column 'messages'"),
        ({"messages": []}, "no message of the user"),
        ({"messages": turns("what ?")}, "the last message must be the assistant's answer"),
        ({"messages": turns("what ?", "red", "why ?")}, "the last message must be the assistant's answer"),
        ({"messages": turns("what ?", "red")[1:]}, "no message of the user"),
        ({"messages": turns("what ?", " \n")}, "the answer is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'; known: system, user, assistant"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [{"role": "user", "content": None}]}, "the user's content is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "the user's content is not text"),
        ({"messages": "what ?"}, "is not a list of messages"),
        ({"messages": ["what ?", "red"]}, "is not a list of messages"),
        ({"conversations": {"from": "human"}}, "is not a list of messages"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        ({"messages": turns("<image>what ?", "red")}, "1 <image> in the messages, but 0 images"),
        (
            {"messages": turns("<image><image>what ?", "red"), "images": [encoded()]},
            "2 <image> in the messages, but 1 images",
        ),
        ({"messages": turns("what ?", "red"), "images": ["none.png"]}, "image file 'none.png' does not exist"),
        ({"messages": turns("what ?", "red"), "images": [5]}, "an image must be encoded bytes, a path, or a mapping"),
        ({"messages": turns("what ?", "red"), "images": [{"bytes": None, "path": None}]}, "an image must be encoded"),
        ({"messages": turns("what ?", "red"), "images": [b"GIF89a nonsense"]}, "an image cannot be decoded"),
        ({"messages": turns("what ?", "red"), "images": [b"no image"]}, "an image cannot be decoded"),
        ({"messages": turns("what ?", "red"), "images": [encoded(kind="JPEG")[:200]]}, "an image cannot be decoded"),
        ({"messages": turns("what ?", "red"), "images": [NOISE[: len(NOISE) // 2]]}, "an image cannot be decoded"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, said, tmp_path):
    assert said in reason(row, folder=tmp_path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"a": "red"}, "column 'q' is missing or null"),
        ({"q": "what ?", "a": None}, "column 'a' is missing or null"),
        ({"q": "what ?", "a": []}, "column 'a' holds no answer"),
        ({"q": "what ?", "a": ""}, "the answer is empty"),
        ({"q": "what ?", "a": [None]}, "column 'a' holds no answer"),
    ],
)
def test_a_benchmark_row_that_cannot_be_used_says_why(row, said):
    assert said in reason(row, columns=MAPPED)


def test_broken_images_of_any_kind_are_bad_rows():
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP"):
        whole = np.frombuffer(encoded(Image.effect_noise((16, 16), 50), kind), np.uint8)
        for _ in range(60):
            broken = whole.copy()[: random.integers(1, len(whole))]
            broken[random.integers(len(broken), size=3)] = random.integers(256, size=3)
            row = {"messages": turns("what ?", "red"), "images": [broken.tobytes()]}
            with contextlib.suppress(BadRow):  # some survive
                assert record(row).images[0].mode == "RGB"


def test_a_bomb_is_a_bad_row(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert "cannot be decoded" in reason({"messages": turns("what ?", "red"), "images": [encoded()]})


def test_lines_are_json_objects():
    assert parse_line('{"id": 1}') == {"id": 1}
    for line, said in (("{", "not valid JSON: "), ("", "not valid JSON"), ("[1]", "a line must hold one JSON object")):
        with pytest.raises(BadRow, match=said.replace("[", r"\[")):
            parse_line(line)
