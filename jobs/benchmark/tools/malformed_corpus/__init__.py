"""A corpus of everything that is wrong, odd or merely unusual in real training data, each case with what must become of it.

- Every case is a small source with at least one good row, so that what is wrong beside it must not cost the good one.
- Knows nothing of how rows are read.
"""

from pathlib import Path

from jobs.benchmark.tools.malformed_corpus import files, images, rows
from jobs.benchmark.tools.malformed_corpus.corpus import Case as Case
from jobs.benchmark.tools.malformed_corpus.corpus import Corpus


def build(folder: Path) -> list[Case]:
    """Writes the corpus into `folder`; returns its cases."""
    corpus = Corpus(folder)
    images.images(corpus)
    images.no_images(corpus)
    rows.conversations(corpus)
    rows.no_conversations(corpus)
    rows.answers(corpus)
    files.lines(corpus)
    files.arrays(corpus)
    files.parquet(corpus)
    files.tables(corpus)
    files.layouts(corpus)
    return corpus.cases
