"""Small configurations, and what is said of wrong ones."""

from pathlib import Path

import pytest

from pipeline.config import (
    ConfigError,
    LearnConfig,
    load_config,
)

STREAM = """
stream:
  tasks:
    - {name: digits, train: data/train, eval: data/eval}
"""


def error_of(file: Path, text: str, *overrides: str) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides, LearnConfig)
    return str(error.value)


def task(**fields) -> str:
    values = {"name": "digits", "train": "a", "eval": "b"} | fields
    return "stream: {tasks: [{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}]}"
