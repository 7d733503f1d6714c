"""Columns of published benchmark files, so that users need not map them.

- chartqa: HuggingFaceM4/ChartQA (`query`, `label`) and lmms-lab/ChartQA (`question`, `answer`).
- docvqa: lmms-lab/DocVQA, HuggingFaceM4/DocumentVQA (`questionId`, `question`, `answers`).
- mmbench: MMBench's own TSV and its parquet copies (`index`, `question`, `hint`, `A` ... `D`, `answer`); the columns
  here are those of `mmbench`'s output.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.config import ColumnsConfig, SourceConfig
from pipeline.data.sources import mmbench

PRESETS: Mapping[str, tuple[ColumnsConfig, ...]] = {
    "chartqa": (
        ColumnsConfig(question="query", answer="label", images="image"),
        ColumnsConfig(question="question", answer="answer", images="image"),
    ),
    "docvqa": (ColumnsConfig(id="questionId", question="question", answer="answers", images="image"),),
    "mmbench": (
        ColumnsConfig(
            id="index", question="question", answer="answer", images="image", choices="choices", group="group"
        ),
    ),
}
"""Columns by preset; of several publications, the one whose question column a row has is used."""


def columns_of(source: SourceConfig, row: Mapping[str, Any]) -> ColumnsConfig:
    """Returns the column names that apply to `row`."""
    if source.preset is None:
        return source.columns
    several = PRESETS[source.preset]
    return next((columns for columns in several if columns.question in row), several[0])


def wanted_columns(source: SourceConfig) -> frozenset[str]:
    """Returns the names of all columns that a source may need."""
    if source.preset == "mmbench":
        return mmbench.COLUMNS
    several = (source.columns,) if source.preset is None else PRESETS[source.preset]
    names = {name for columns in several for name in columns.model_dump().values() if name is not None}
    return frozenset(names | {"conversations", "image"})
