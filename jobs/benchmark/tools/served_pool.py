"""Answers prompts with a registered pool in an environment that holds what the pool's version requires, and no more.

python served_pool.py sqlite:////runs/mlflow.db models:/tiny.pool.demo/2 prompts.json answers.json
"""

import importlib.util
import json
import sys
from pathlib import Path

import mlflow
import pandas as pd

TOKENS = 8
"""Most tokens of an answer."""


def main(uri: str, model: str, prompts: str, answers: str) -> None:
    """Writes answers and experts to the file `answers`."""
    importable = any(importlib.util.find_spec(name) for name in ("pipeline", "jobs"))
    mlflow.set_tracking_uri(uri)
    rows = json.loads(Path(prompts).read_text())
    predicted = mlflow.pyfunc.load_model(model).predict(pd.DataFrame(rows), {"max_new_tokens": TOKENS})
    Path(answers).write_text(json.dumps(predicted.to_dict("list") | {"project_importable": importable}))


if __name__ == "__main__":
    main(*sys.argv[1:])
