"""Streams the elements of a JSON file: an array of rows as LLaVA's, or consecutive objects.

- Memory stays flat: only one element and the text read ahead are in memory.
- A broken element costs only itself: reading goes on at the next readable one.
- Independent of what an element means.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from pipeline.data.errors import UnreadableRow, printable

READ = 1 << 20
"""Characters per read."""

LONGEST = 1 << 25
"""Characters after which an unfinished element counts as broken."""

_DECODER = json.JSONDecoder(strict=False)
"""Accepts tabs and line breaks inside texts, which JSON forbids."""
WHOLE_FILE = "the whole file"
"""`lost` of an UnreadableRow for a file that cannot be read at all."""

_SPACE = re.compile(r"[\s\ufeff]*")
_NEXT = re.compile(r"[,}\]]\s*(?=\{)")
_END = re.compile(r"\}\s*\]\s*\Z")
"""End of a complete array of rows."""
_TAIL = 64
"""An error this close to the end of the buffer may be due to text that was not read yet."""


class Text(Protocol):
    """An open text file."""

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
    """Whether an invalid JSON text may be the beginning of a valid one."""
    try:
        _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


class JsonStream:
    """Iterates over the elements of `text`; `row_keys` are keys that identify a row after a broken element."""

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
        """Drops consumed text and reads on, doubling the buffer, so that long elements are not parsed often."""
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
        """Whether the error may be due to an element that was not read to its end."""
        if not isinstance(error, json.JSONDecodeError) or len(self._buffer) - self._at > LONGEST:
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - _TAIL

    def _skip(self, error: Exception) -> UnreadableRow:
        """Skips to the next readable element; the text in between is one UnreadableRow."""
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
        """Whether a row begins at `start`: an object with one of the row keys, not a part of a row."""
        try:
            element, end = _DECODER.raw_decode(self._buffer, start)
        except (ValueError, RecursionError):
            return False
        return isinstance(element, dict) and not self._row_keys.isdisjoint(element)
