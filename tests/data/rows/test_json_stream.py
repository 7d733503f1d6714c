"""JSON files of many rows, whole and damaged."""

import io
import json

import pytest

from pipeline.data.errors import UnreadableRow
from pipeline.data.rows import json_stream
from pipeline.data.rows.json_stream import JsonStream, parse

ROW_KEYS = ("id", "conversations")


def row(number: int) -> dict:
    turns = [{"from": "human", "value": f'q{number} }}, {{ "'}, {"from": "gpt", "value": "a, ] "}]
    return {"id": number, "conversations": turns}


ROWS = [json.dumps(row(n)) for n in range(4)]


class Drip(io.StringIO):
    """A text that is handed out in small pieces."""

    def __init__(self, text: str, size: int) -> None:
        super().__init__(text)
        self.size, self.longest = size, 0

    def read(self, size: int = -1) -> str:
        self.longest = max(self.longest, size)
        return super().read(self.size)


def elements(text: str) -> list:
    return list(JsonStream(io.StringIO(text), ROW_KEYS))


def ids(text: str) -> list:
    """Returns the rows' ids, and x for a fault."""
    return ["x" if isinstance(element, UnreadableRow) else element["id"] for element in elements(text)]


@pytest.mark.parametrize(
    "text",
    [
        f"[{','.join(ROWS)}]", json.dumps([row(n) for n in range(4)], indent=2), "\n".join(ROWS),
        f"\ufeff[{', '.join(ROWS)}]\n", f"[{','.join(ROWS)},]",
    ],
    ids=["array", "indented", "lines", "marked", "trailing comma"],
)  # fmt: skip
def test_rows_in_any_writing(text):
    assert elements(text) == [row(n) for n in range(4)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_pieces_may_end_anywhere(size):
    text = f"[{','.join(ROWS)}, 12, 345.5, true, null]"
    assert list(JsonStream(Drip(text, size), ROW_KEYS)) == [*(row(n) for n in range(4)), 12, 345.5, True, None]


@pytest.mark.parametrize(
    "broken",
    [
        ROWS[1][:-1], ROWS[1].replace('"q1', "q1"), ROWS[1].replace('a, ] "', "a"), ROWS[1].replace("[", "(", 1),
        ROWS[1].replace(":", "", 1), "nonsense", '{"id": ' + "1" * 5000 + "}", "{'id': 1}",
    ],
    ids=["no brace", "no quote before", "no quote behind", "no list", "no colon", "no JSON", "no number", "Python"],
)  # fmt: skip
@pytest.mark.parametrize("size", [10, 10_000])
def test_a_broken_row_costs_itself(broken, size):
    text = f"[{ROWS[0]}, {broken}, {ROWS[2]}, {ROWS[3]}]"
    seen = list(JsonStream(Drip(text, size), ROW_KEYS))
    assert [seen[0], *seen[2:]] == [row(0), row(2), row(3)]
    assert isinstance(seen[1], UnreadableRow)
    assert seen[1].reason.startswith("not valid JSON: ")
    assert seen[1].excerpt.startswith(broken[:10])


def test_a_missing_comma_costs_nothing():
    assert ids(f"[{ROWS[0]} {ROWS[1]}]") == [0, 1]


def test_a_cut_file_says_so():
    assert ids(f"[{ROWS[0]}, {ROWS[1][:40]}") == [0, "x"]
    assert "no row could be read after it" in elements(f"[{ROWS[0]}, {ROWS[1][:40]}")[1].reason
    assert ids(f"[{ROWS[0]}, {ROWS[1]}") == [0, 1, "x"]
    assert "ends before its array does" in elements(f"[{ROWS[0]}")[1].reason
    assert "ends before its array does" in elements("[")[0].reason


def test_what_follows_the_array_is_told():
    assert ids(f"[{ROWS[0]}] and more") == [0, "x"]
    assert ids(f"[{ROWS[0]}]]") == [0, "x"]


def test_an_empty_file_is_no_array():
    assert elements("[]") == []
    for text in ("", " \n"):
        assert "the file is empty" in elements(text)[0].reason


@pytest.mark.parametrize("text", ["[" * 100_000, '{"id":' * 100_000])
def test_depth_is_a_fault(text):
    assert "nested too deeply" in elements(text)[0].reason


def test_tabs_and_line_breaks_inside_texts_are_kept():
    assert elements('[{"id": "a\tb\nc"}]') == [{"id": "a\tb\nc"}]


def test_memory_stays_flat(monkeypatch):
    """What is read ahead does not grow with the file, nor without end where an element does not end."""
    monkeypatch.setattr(json_stream, "READ", 1000)
    text = Drip(f"[{','.join(json.dumps(row(n)) for n in range(5000))}]", 1000)
    assert sum(1 for _ in JsonStream(text, ROW_KEYS)) == 5000
    assert text.longest <= 2000
    monkeypatch.setattr(json_stream, "LONGEST", 8000)
    text = Drip(f'[{{"id": "{"x" * 200_000}, {",".join(ROWS)}]', 1000)
    assert [type(element) for element in JsonStream(text, ROW_KEYS)] == [UnreadableRow, dict, dict, dict, dict]
    assert text.longest <= 10_000


def test_reasons_are_readable():
    for text, message in (
        ("{", "not valid JSON: Expecting"),
        ("", "not valid JSON"),
        ("[" * 9999, "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)
    with pytest.raises(ValueError, match="is it UTF-16"):
        parse('{"a": 1}'.encode("utf-16-le").decode())
    with pytest.raises(ValueError, match="limit"):
        parse('{"a": ' + "1" * 5000 + "}")
    assert parse('{"id": 1}') == {"id": 1}
