"""A mistake in a configuration is answered before the libraries that take seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STREAM = "jobs/configs/demo.yaml"

TASK = ["jobs/configs/task.yaml", "--pool", "models:/tiny.pool.demo"]

RUN = """
import sys
from jobs.cli import app
try:
    app(sys.argv[1:])
finally:
    print("imported:", *sorted({"torch", "ray", "mlflow", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["learn", STREAM],
        ["compare", STREAM],
        ["sweep", STREAM],
        ["plan", STREAM],
        ["doctor", STREAM],
        ["recompute-statistics", STREAM],
        ["add", *TASK],
        ["registry", "import", "folder", *TASK],
    ],
    ids=" ".join,
)
def test_a_typo_is_answered_before_torch_ray_and_mlflow_are_imported(words: list[str]) -> None:
    command = [sys.executable, "-c", RUN, *words, "expert.rnak=3"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2, answer.stderr
    assert "rnak" in answer.stderr
    assert answer.stdout.strip() == "imported:"


def test_settings_of_answers_in_bulk_are_read_first() -> None:
    words = ["predict", "rows.parquet", "answers", "--pool", "runs/demo/pool", "source.colums.question=query"]
    command = [sys.executable, "-c", RUN, *words]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2, answer.stderr
    assert "colums" in answer.stderr
    assert answer.stdout.strip() == "imported:"
