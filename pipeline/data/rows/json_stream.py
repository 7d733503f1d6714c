"""The elements of a JSON file, one after the other: an array of rows as LLaVA's, or objects in a row.

- Memory stays flat: no more than one element and the text that was read ahead is held.
- A broken element costs itself: reading goes on at the next one that can be read.
- Knows nothing of what an element means.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from pipeline.data.errors import UnreadableRow, printable

READ = 1 << 20
"""Characters that are read at a time."""

LONGEST = 1 << 25
"""Characters after which an element that does not end is taken for a broken one."""

_DECODER = json.JSONDecoder(strict=False)
"""Takes tabs and line breaks inside texts, which are meant where they stand, if not allowed."""
WHOLE_FILE = "the whole file"
"""What an UnreadableRow says of a file of which nothing can be read."""

_SPACE = re.compile(r"[\s\ufeff]*")
_NEXT = re.compile(r"[,}\]]\s*(?=\{)")
_END = re.compile(r"\}\s*\]\s*\Z")
"""How an array of rows ends that was written to its end."""
_TAIL = 64
"""A fault this near to the end of what was read may come from what was not read yet."""


class Text(Protocol):
    """What is read: an open text file."""

    def read(self, size: int, /) -> str:
        """Returns up to `size` characters; none at the end."""


def parse(text: str) -> Any:
    """Parses JSON; raises ValueError with a readable reason, whatever is wrong with the text."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        hint = "; the text holds NUL characters: is it UTF-16?" if "\x00" in text[:1000] else ""
        raise ValueError(f"not valid JSON: {error}{hint}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"not valid JSON: {error}") from None


def breaks_off(text: str) -> bool:
    """Whether a text that is not valid JSON is the beginning of one that may be."""
    try:
        _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


class JsonStream:
    """Iterates over the elements of `text`; `known` are keys by which an element is recognised after a broken one."""

    def __init__(self, text: Text, row_keys: Collection[str]) -> None:
        self._text, self._row_keys = text, frozenset(row_keys)
        self._buffer, self._at, self._ended = "", 0, False
        self._in_array = False
        self._number = 0

    def __iter__(self) -> Iterator[Any | UnreadableRow]:
        """Yields elements, and an UnreadableRow for each place that cannot be read."""
        if self._peek() == "":
            yield UnreadableRow("the file is empty: not even an array", lost=WHOLE_FILE, rows=0)
            return
        self._in_array = self._peek() == "["
        self._at += self._in_array
        while following := self._peek():
            if following == "," or (following == "]" and self._in_array):
                self._at += 1
                self._in_array = self._in_array and following == ","
            else:
                self._number += 1
                yield self._element()
        if self._in_array:
            yield UnreadableRow(
                "the file ends before its array does: rows are missing at the end", lost=self._rest(), rows=0
            )

    def _rest(self) -> str:
        return f"all rows beyond row {self._number}"

    def _peek(self) -> str:
        """Returns the next character that is not white space; none at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._more()

    def _more(self) -> None:
        """Reads on; drops what was used. Reads as much again as is held, so that long elements are not parsed often."""
        rest = self._buffer[self._at :]
        piece = self._text.read(max(READ, len(rest)))
        self._buffer, self._at, self._ended = rest + piece, 0, not piece

    def _element(self) -> Any | UnreadableRow:
        while True:
            try:
                element, end = _DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                if self._ended or not self._unfinished(error):
                    return self._skip(error)
            else:
                # A number at the end of the buffer may go on.
                complete = isinstance(element, (dict, list, str)) or end < len(self._buffer) - _TAIL
                if complete or self._ended:
                    self._at = end
                    return element
            self._more()

    def _unfinished(self, error: Exception) -> bool:
        """Whether the fault may be that the element was not read to its end."""
        if not isinstance(error, json.JSONDecodeError) or len(self._buffer) - self._at > LONGEST:
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _TAIL

    def _skip(self, error: Exception) -> UnreadableRow:
        """Goes to the next element that can be read; what lies between is one UnreadableRow."""
        if isinstance(error, json.JSONDecodeError):
            reason = f"not valid JSON: {error.msg}: character {error.pos - self._at} of the element"
        else:
            reason = (
                "not valid JSON: nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"
            )
        excerpt = printable(self._buffer[self._at : self._at + 1000])
        while True:
            for match in _NEXT.finditer(self._buffer, self._at):
                if self._starts_element(match.end()):
                    self._at = match.end()
                    return UnreadableRow(reason, excerpt)
            if self._ended:
                rest = self._buffer[self._at :]
                cut = not _END.search(rest) if self._in_array else breaks_off(rest)
                self._at, self._in_array = len(self._buffer), False
                return UnreadableRow(
                    f"{reason}; no row could be read after it", excerpt, lost=self._rest() if cut else ""
                )
            self._at = max(self._at, len(self._buffer) - LONGEST)
            self._more()

    def _starts_element(self, start: int) -> bool:
        """Whether an element stands at `place`: an object with a known key, not one of the parts of an element."""
        try:
            element, end = _DECODER.raw_decode(self._buffer, start)
        except (ValueError, RecursionError):
            return False
        return isinstance(element, dict) and not self._row_keys.isdisjoint(element)
