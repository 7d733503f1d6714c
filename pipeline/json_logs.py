"""Logs as JSON, one object a line, for programs that collect them: on request, by POINTSMAN_LOG=json.

Every line has time, level, logger and message, and says which run, task, stage and rank it is about where it is about one. The
driver's lines take the place of bars and tables; a worker's lie in Ray's log folder, as all that workers print.
"""

import json
import logging
import math
import os
import sys
from datetime import UTC, datetime
from typing import Any

from pipeline.config import without_secrets

VARIABLE = "POINTSMAN_LOG"
"""Environment variable that asks for them: `json`."""

LOGGERS = ("pointsman", "pipeline", "cluster", "jobs", "tuning")
"""Loggers of this project."""

FIELDS = ("run", "task", "stage", "rank", "step", "steps", "loss", "rows_per_second", "data_wait")
"""What a line may say beside its message, in this order; `data_wait` is a share of the time."""


def are_wanted() -> bool:
    """Whether this process is to log JSON."""
    return os.environ.get(VARIABLE) == "json"


class JsonFormatter(logging.Formatter):
    """Turns a record into one line of JSON with what is known of its process."""

    def __init__(self, **known: Any) -> None:
        super().__init__()
        self.known = known

    def format(self, record: logging.LogRecord) -> str:
        """Called by logging."""
        fields = self.known | {name: vars(record)[name] for name in FIELDS if name in vars(record)}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": without_secrets(record.getMessage()),
            **{name: fields[name] for name in FIELDS if name in fields and _is_json(fields[name])},
        }
        if record.exc_info:
            line["traceback"] = without_secrets(self.formatException(record.exc_info))
        return json.dumps(line)


def _is_json(value: Any) -> bool:
    """Whether JSON knows a value: it has no NaN, which the loss of a restart is."""
    return not isinstance(value, float) or math.isfinite(value)


def use_json_logs(**known: Any) -> None:
    """Makes this project's loggers write JSON to stderr, with what is `known` of this process (run, rank)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**known))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]  # an earlier run's of this process too
        logger.setLevel(logging.INFO)
        logger.propagate = False
