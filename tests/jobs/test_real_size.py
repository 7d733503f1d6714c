"""The path that a large base on several GPUs takes, end to end: wide, bf16, sharded, streamed, mixed rows, many callers."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.data.demo.files import SCHEMA, demo_file
from pipeline.routing.features import source_width
from pipeline.routing.pool import Pool
from tests.jobs.test_learn import learn_here

pytestmark = pytest.mark.ray

ROWS = 48


def _mixed(folder: Path) -> Path:
    """Writes one file in which all rows with an image come first, then those without; answers of one to four words."""
    images = pq.read_table(demo_file("demo://digits/train", folder)).slice(0, ROWS // 2).to_pylist()
    texts = [
        {
            "id": f"text-{n}",
            "messages": [
                {"role": "user", "content": f"repeat : {' '.join(str((n + i) % 10) for i in range(1 + n % 4))}"},
                {"role": "assistant", "content": " ".join(str((n + i) % 10) for i in range(1 + n % 4))},
            ],
            "images": [],
        }
        for n in range(ROWS // 2)
    ]
    file = folder / "mixed.parquet"
    pq.write_table(pa.Table.from_pylist([*images, *texts], schema=SCHEMA), file)
    return file


@pytest.fixture(scope="module")
def learned(wide_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("real-size")
    config = {
        "name": "wide",
        "output": str(output),
        "base": {"path": str(wide_folder), "name": "wide", "dtype": "bfloat16"},
        "stream": {
            "tasks": [
                {
                    "name": "mixed",
                    "train": str(_mixed(output)),
                    "eval": {"path": "demo://digits/eval", "limit": 8},
                },
                {
                    "name": "clock",
                    "train": {"path": "demo://clock/train", "limit": ROWS},
                    "eval": {"path": "demo://clock/eval", "limit": 8},
                },
            ],
            "benchmarks": [{"name": "repeat", "eval": {"path": "demo://repeat/eval", "limit": 8}}],
            "base_prompts": {"path": "demo://general/train", "limit": 64},
        },
        "data": {"cache": "none"},
        "expert": {"steps": 4, "batch_size": 10, "rank": 4, "learning_rate": 0.001},
        "router": {"steps": 3},
        "training": {
            "cpus_per_worker": 1,
            "workers": 2,
            "zero_stage": 3,
            "zero_persistence_threshold": 0,
            "precision": "bf16",
            "micro_batch": 2,
            "gradient_checkpointing": True,
        },
        "evaluation": {"max_new_tokens": 2},
    }
    file = output / "wide.yaml"
    file.write_text(yaml.safe_dump(config))
    learn_here(file)
    return output


def test_statistics_are_projected_and_of_distinct_rows(learned):
    pool = Pool.load(learned / "wide" / "pool")
    assert pool.names == ["mixed", "clock"]
    for expert in pool.experts.values():
        assert expert.statistics.count == ROWS
        assert expert.statistics.width < source_width(512)


def test_rows_per_step_do_not_shrink(learned):
    summary = json.loads((learned / "wide" / "summary.json").read_text())
    assert [task["samples"] for task in summary["tasks"].values()] == [40, 40]


def test_callers_at_once_get_their_own_answers(learned, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{learned / 'mlflow.db'}")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    model = mlflow.pyfunc.load_model("models:/wide.pool.wide/2")
    rows = [{"prompt": f"repeat : {n}", "image": None} for n in range(10)]
    images = pq.read_table(learned / "data" / "demo" / "clock" / "eval.parquet").slice(0, 10).to_pylist()
    rows += [{"prompt": "which hour does the clock show ?", "image": row["images"][0]["bytes"]} for row in images]
    alone = [model.predict([row], {"max_new_tokens": 2}).to_dict("records")[0] for row in rows]
    with ThreadPoolExecutor(4) as threads:
        together = list(
            threads.map(lambda row: model.predict([row], {"max_new_tokens": 2}).to_dict("records")[0], rows)
        )
    assert together == alone
