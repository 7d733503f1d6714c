"""Real text that every machine has: the documentation of Python's standard library, as rows to learn from and to keep.

- `modules`: which of eight modules a description comes from. A function's name decides whether its rows are for training
  or held out, so overloads and copies of a description never stand on both sides.
- `general`, `documentation`: ordinary requests about the other modules; the base prompts, and held-out ones of its kind.
- `reference`: requests about prose from the language reference, a kind of text that the base prompts does not hold.

Read from the sources (nothing of the library is imported or run), in a fixed order: the same Python gives the same rows.
"""

import ast
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

from pipeline.data.errors import StreamError

MODULES = {
    "asyncio": "asyncio",
    "email": "email",
    "importlib": "importlib",
    "logging": "logging",
    "multiprocessing": "multiprocessing",
    "xml": "xml",
    "_pydecimal": "decimal",
    "unittest": "unittest",
}
"""The eight modules of the task, by the name of their source."""

OPTIONAL = (
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
    "distutils",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "test",
)
"""Parts of the library that some systems leave out, and what is no part of it."""

SHORTEST, LONGEST = 40, 200
"""Characters of a description: its first paragraph."""

HELD_OUT = 5
"""One in so many names is held out."""

GENERAL, QUESTIONS = 240, 60
"""Requests in the base prompts, and in each of the two held-out sets."""

Row = dict[str, object]
T = TypeVar("T")


@dataclass(frozen=True)
class Description:
    """What a function or class says of itself."""

    module: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether its rows are for evaluation, by its bare name."""
        return hashlib.sha256(self.name.encode()).digest()[0] % HELD_OUT == 0


def descriptions(library: Path) -> Iterator[Description]:
    """Yields the descriptions in the sources below `library`, each text once."""
    seen = set()
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        module = parts[0].removesuffix(".py")
        private = module.startswith("_") and module not in MODULES
        if private or module in OPTIONAL or {"test", "tests"} & set(parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            if SHORTEST <= len(text) <= LONGEST and text not in seen:
                seen.add(text)
                yield Description(module, node.name, text)


def paragraphs() -> Iterator[tuple[str, str]]:
    """Yields paragraphs of the language reference as their first sentence and the rest."""
    for _, topic in sorted(topics.items()):
        for paragraph in topic.split("\n\n"):
            text = " ".join(paragraph.split())
            first, _, rest = text.partition(". ")
            if 200 <= len(text) <= 500 and "::" not in text and paragraph[:1].isupper() and len(rest) >= SHORTEST:
                yield f"{first}.", rest


def requests(described: Iterable[Description]) -> Iterator[Row]:
    """Turns descriptions into ordinary requests, three kinds in turn; two of them quote the description."""
    for number, (name, text) in enumerate((d.name, d.text) for d in described):
        words = text.split()
        half = len(words) // 2
        kinds = (
            (f"What does {name} do in Python?", text),
            (f"Suggest a name for this Python function: {text}", name),
            (f"Continue: {' '.join(words[:half])}", " ".join(words[half:])),
        )
        yield row(f"{number}-{name}", *kinds[number % len(kinds)])


def row(identity: str, question: str, answer: str) -> Row:
    """Returns a row in the canonical format."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": identity, "messages": messages}


def write_library(folder: Path) -> dict[str, int]:
    """Writes all rows as jsonl files into `folder`; returns their number by file."""
    described = list(descriptions(Path(sysconfig.get_paths()["stdlib"])))
    task = [d for d in described if d.module in MODULES]
    others = [d for d in described if d.module not in MODULES]
    sample, kept = ([d for d in others if d.held_out == held_out] for held_out in (False, True))
    random.Random(0).shuffle(task)  # the first rows, which is what a limit takes, are of all modules
    rows = [row(f"{i}-{d.name}", d.text, MODULES[d.module]) for i, d in enumerate(task)]
    prose = list(paragraphs())
    files: dict[str, list[Row]] = {
        "modules-train": [r for r, d in zip(rows, task, strict=True) if not d.held_out],
        "modules-eval": [r for r, d in zip(rows, task, strict=True) if d.held_out],
        "general": list(requests(_spread(sample, GENERAL))),
        "documentation": list(requests(_spread(kept, QUESTIONS))),
        "reference": [
            row(f"reference-{i}", f"Explain this to a beginner: {first}", rest)
            for i, (first, rest) in enumerate(_spread(prose, QUESTIONS))
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {name: len(rows) for name, rows in files.items()}


def _spread(items: list[T], count: int) -> list[T]:
    """Returns `count` of the items, evenly spread over them."""
    if len(items) < count:
        raise StreamError(
            f"{sysconfig.get_paths()['stdlib']}: {len(items)} descriptions where {count} are needed; this Python comes "
            "without the sources of its library, take one that has them"
        )
    return [items[i * len(items) // count] for i in range(count)]
