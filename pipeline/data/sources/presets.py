"""Columns of published benchmark files, so that their users map nothing by hand.

- chartqa: HuggingFaceM4/ChartQA (`query`, `label`) and lmms-lab/ChartQA (`question`, `answer`).
- docvqa: lmms-lab/DocVQA, HuggingFaceM4/DocumentVQA (`questionId`, `question`, `answers`).
- mmbench: MMBench's own TSV and its parquet copies (`index`, `question`, `hint`, `A` ... `D`, `answer`); rewritten by
  `mmbench`, whose output the columns here are.
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
"""Columns by preset; where there are several publications, the one whose question column a row has."""


def columns_of(source: SourceConfig, row: Mapping[str, Any]) -> ColumnsConfig:
    """Returns which columns of `row` hold what."""
    if source.preset is None:
        return source.columns
    several = PRESETS[source.preset]
    return next((columns for columns in several if columns.question in row), several[0])


def wanted_columns(source: SourceConfig) -> frozenset[str]:
    """Returns the names of all columns that may be needed of a source's files."""
    if source.preset == "mmbench":
        return mmbench.COLUMNS
    several = (source.columns,) if source.preset is None else PRESETS[source.preset]
    names = {name for columns in several for name in columns.model_dump().values() if name is not None}
    return frozenset(names | {"conversations", "image"})
