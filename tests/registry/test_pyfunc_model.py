import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.pyfunc.scoring_server import _split_data_and_params, infer_and_parse_data, init
from PIL import Image

from pipeline.config import BaseModelConfig
from pipeline.data.demo.abilities import ABILITIES
from pipeline.models.bases import load_base
from pipeline.models.encoding import encode
from pipeline.models.generation import generate_answers
from pipeline.models.inference import FrozenBase, InferenceWorkers
from pipeline.registry import pyfunc_model
from pipeline.registry.bases import register_base
from pipeline.registry.experts import register_expert
from pipeline.registry.pools import register_pool
from pipeline.registry.pyfunc_model import RequestError, RoutedPool, RowError, read_image
from pipeline.registry.tracking import RegistryError, tracked_run
from pipeline.registry.versions import logged_model_id
from pipeline.routing import Pool, RoutedModel
from tests.helpers import CLAIMS, GENERAL
from tests.registry.conftest import Created, MakeExpert, new_experiment


def png(image: str | Image.Image) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 64), image) if isinstance(image, str) else image
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pool_folder(
    make_expert: MakeExpert, make_pool: Callable[..., Pool], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pool of two experts."""
    pool = make_pool(make_expert("digits", "e1"), make_expert("clock", "e2", 3.0))
    return pool.save(tmp_path_factory.mktemp("pools") / "pool")


@pytest.fixture(scope="module")
def model(created: Created, tiny_folder: Path, pool_folder: Path) -> mlflow.pyfunc.PyFuncModel:
    """The newest version, as a user loads it."""
    experiment = new_experiment(created, pool_folder.parent / "store")
    with tracked_run(experiment, "demo", "run"):
        pool = Pool.load(pool_folder)
        versions = {name: register_expert("untrained", pool_folder / "experts" / name) for name in pool.names}
        register_pool(pool, BaseModelConfig(path=str(tiny_folder)), name="demo", digest="p", experts=versions)
    return mlflow.pyfunc.load_model("models:/untrained.pool.demo/latest")


def test_answers_are_the_routed_models_own(
    model: mlflow.pyfunc.PyFuncModel, tiny_folder: Path, pool_folder: Path
) -> None:
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    routed = RoutedModel(base.model, Pool.load(pool_folder))
    colors = ["red", "blue", None]
    prompts = ["what color is it ?", "what shape is it ?", "repeat : red blue"]
    answers, experts = [], []
    for color, prompt in zip(colors, prompts, strict=True):
        images = [Image.new("RGB", (64, 64), color)] if color else []
        user = {"role": "user", "content": "<image>" * len(images) + prompt}
        row = encode(base.processor, [user, {"role": "assistant", "content": ""}], images, answer=False)
        answers += generate_answers(base.model, base.processor, [row], max_new_tokens=4)
        experts += [decision.expert or "base" for decision in routed.decisions]
    table = pd.DataFrame({"prompt": prompts, "image": [png(c) if c else None for c in colors]}, index=[7, 8, 9])
    predicted = model.predict(table, {"max_new_tokens": 4, "batch_size": 2})
    assert list(predicted.index) == [7, 8, 9]
    assert predicted["answer"].tolist() == answers
    assert predicted["expert"].tolist() == experts


def test_with_little_memory_for_experts_answers_are_the_same(model: mlflow.pyfunc.PyFuncModel) -> None:
    table = pd.DataFrame({"prompt": ["what color is it ?", "what shape is it ?"]})
    paged = mlflow.pyfunc.load_model("models:/untrained.pool.demo/latest", model_config={"expert_memory": "1KiB"})
    assert paged.unwrap_python_model().routed.expert_memory == 1024
    assert model.unwrap_python_model().routed.expert_memory is None
    assert paged.predict(table, {"max_new_tokens": 3}).equals(model.predict(table, {"max_new_tokens": 3}))


@pytest.mark.parametrize("orient", ["dataframe_records", "dataframe_split"])
def test_a_server_takes_base64_and_null(model: mlflow.pyfunc.PyFuncModel, orient: str) -> None:
    """The request goes through the very parser that `mlflow models serve` applies."""
    rows: list[dict[str, Any]] = [
        {"prompt": "what color is it ?", "image": base64.b64encode(png("red")).decode()},
        {"prompt": "repeat : red", "image": None},
    ]
    split = {"columns": ["prompt", "image"], "data": [list(row.values()) for row in rows]}
    request = {orient: rows if orient == "dataframe_records" else split, "params": {"max_new_tokens": 3}}
    data, params = _split_data_and_params(json.dumps(request))
    served = model.predict(infer_and_parse_data(data, model.metadata.get_input_schema()), params=params)
    direct = model.predict(
        pd.DataFrame({"prompt": [row["prompt"] for row in rows], "image": [png("red"), None]}), {"max_new_tokens": 3}
    )
    assert served.equals(direct)


def test_requests_at_once_get_their_own_answers(tiny_folder: Path, known_pool: Pool) -> None:
    """From 8 threads, as a server's clients send them; four experts, the base among them, in every table."""
    pool, tables = RoutedPool(), []
    pool.frozen = FrozenBase(BaseModelConfig(path=str(tiny_folder)), InferenceWorkers(cpus_per_worker=1))
    pool.processor, pool.routed = pool.frozen.base.processor, RoutedModel(pool.frozen.base.model, known_pool)
    for number in range(16):
        random = np.random.default_rng(number)
        examples = [ABILITIES[ability](random) for ability in (*CLAIMS.values(), GENERAL)]
        images = [png(e.image) if e.image else None for e in examples]
        tables.append(pd.DataFrame({"prompt": [e.question for e in examples], "image": images}).sample(frac=1))
    params = {"max_new_tokens": 3, "batch_size": 2}
    expected = [pool.predict(None, table, params) for table in tables]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda table: pool.predict(None, table, params), 2 * tables))
    assert {expert for table in expected for expert in table["expert"]} == {*CLAIMS, "base"}
    assert all(f.equals(e) for f, e in zip(answers, 2 * expected, strict=True))


def test_the_image_column_may_be_missing(model: mlflow.pyfunc.PyFuncModel) -> None:
    assert len(model.predict(pd.DataFrame({"prompt": ["repeat : red", "repeat : blue"]}), {"max_new_tokens": 2})) == 2


def test_a_row_without_an_image_may_say_so_in_any_way() -> None:
    assert [read_image(value) for value in (None, float("nan"), pd.NA, "")] == [None] * 4
    with pytest.raises(RowError, match="must be bytes or base64 text, found ndarray"):
        read_image(np.zeros(2))


def test_a_bad_row_costs_no_other_its_answer(model: mlflow.pyfunc.PyFuncModel) -> None:
    cut = [png("red")[:length] for length in (20, 40, 60)]
    for value in (b"no image", "no base64!", base64.b64encode(b"no image").decode(), 7, 0.5, "data:image/png,x", *cut):
        with pytest.raises(RowError, match="column image"):
            read_image(value)
    assert read_image("data:image/png;base64," + base64.b64encode(png("red")).decode()) is not None
    good = pd.DataFrame({"prompt": ["what color is it ?", "repeat : red"], "image": [png("red"), None]}, index=[1, 4])
    prompts, images = ["<image>what is it ?", "what ?", "what " * 600], [None, b"no image", None]
    bad = pd.DataFrame({"prompt": prompts, "image": images}, index=[2, 3, 5])
    predicted = model.predict(pd.concat([good, bad]).sort_index(), {"max_new_tokens": 3})
    assert list(predicted.columns) == ["answer", "expert", "error"]
    assert predicted.loc[[1, 4]].equals(model.predict(good, {"max_new_tokens": 3}))
    assert predicted.loc[[2, 3, 5], ["answer", "expert"]].isna().all(axis=None)
    assert predicted.loc[5, "error"].endswith(" tokens, the base takes 512")
    assert predicted.loc[2, "error"] == "column prompt: 1 x <image>, but 0 image"
    assert predicted.loc[3, "error"].startswith("column image: neither an encoded image")
    assert predicted.loc[[1, 4], "error"].isna().all()


def test_a_server_sends_null_for_a_bad_row_and_no_traceback(model: mlflow.pyfunc.PyFuncModel) -> None:
    with TestClient(init(model)) as client:
        rows = [{"prompt": "repeat : red", "image": None}, {"prompt": "what ?", "image": "no image"}]
        answer = client.post("/invocations", json={"dataframe_records": rows, "params": {"max_new_tokens": 2}})
        first, second = answer.json()["predictions"]
        assert first["expert"] in ("digits", "clock", "base")
        assert (first["error"], second["answer"], second["expert"]) == (None, None, None)
        assert "neither an encoded image" in second["error"]
        for request in ({"dataframe_records": [{"question": "?"}]},
                        {"dataframe_records": rows, "params": {"batch_size": 0}}):  # fmt: skip
            answer = client.post("/invocations", json=request)
            assert answer.status_code == 400
            assert "Traceback" not in answer.text
            assert str(Path(__file__).parents[2]) not in answer.text


def test_a_server_takes_csv(model: mlflow.pyfunc.PyFuncModel) -> None:
    """Rows without an image, rows with one, and rows that cannot be answered."""
    image = base64.b64encode(png("red")).decode()
    with TestClient(init(model)) as client:
        for table, errors in (
            (f"prompt,image\nwhat color is it ?,{image}\nrepeat : red,\n12,x\n", [False, False, True]),
            ('prompt\nrepeat : red\n""\n', [False, True]),
            ("prompt,image\nrepeat : red,\n", [False]),
        ):
            answer = client.post("/invocations", content=table, headers={"content-type": "text/csv"})
            assert answer.status_code == 200, answer.text
            assert [row["error"] is not None for row in answer.json()["predictions"]] == errors


def test_what_goes_wrong_inside_is_told_without_a_traceback(model: mlflow.pyfunc.PyFuncModel) -> None:
    pool = RoutedPool()
    with pytest.raises(RequestError, match="AttributeError while answering; the server's log says more"):
        pool.predict(None, pd.DataFrame({"prompt": ["?"]}))


def test_images_are_read_window_by_window(
    model: mlflow.pyfunc.PyFuncModel, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, known_pool: Pool
) -> None:
    """The first answers do not wait for all images, and a window ends at its bytes."""
    pool, log = RoutedPool(), []
    pool.frozen = FrozenBase(BaseModelConfig(path=str(tiny_folder)), InferenceWorkers(cpus_per_worker=1))
    pool.processor, pool.routed = pool.frozen.base.processor, RoutedModel(pool.frozen.base.model, known_pool)
    read, answer = pyfunc_model.read_image, pool.frozen.answer
    monkeypatch.setattr(pyfunc_model, "read_image", lambda value: (log.append("read"), read(value))[1])
    monkeypatch.setattr(pool.frozen, "answer", lambda rows, most: (log.append(len(rows)), answer(rows, most))[1])
    table = pd.DataFrame({"prompt": ["what color is it ?"] * 10, "image": [png("red")] * 10})
    whole = pool.predict(None, table, {"max_new_tokens": 2, "batch_size": 1})
    assert log == ["read"] * 4 + [1] * 4 + ["read"] * 4 + [1] * 4 + ["read"] * 2 + [1] * 2
    log.clear()
    monkeypatch.setattr(pyfunc_model, "WINDOW_BYTES", 1)
    assert pool.predict(None, table, {"max_new_tokens": 2, "batch_size": 8}).equals(whole)
    assert log == ["read", 1] * 10


def test_another_base_is_refused(experiment: str, tiny_folder: Path, pool_folder: Path, tmp_path: Path) -> None:
    other = load_base(BaseModelConfig(path=str(tiny_folder)))
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    with tracked_run(experiment, "other", "other"):
        version = register_base(BaseModelConfig(path=str(tmp_path / "other")))
    context = mlflow.pyfunc.PythonModelContext(
        artifacts={"pool": str(pool_folder)},
        model_config={"base_model_id": logged_model_id(version), "dtype": "float32", "trust_remote_code": False},
    )
    with pytest.raises(ValueError, match="has the registered checkpoint changed"):
        RoutedPool().load_context(context)


def test_a_base_that_is_not_in_the_registry_says_so(experiment: str, pool_folder: Path) -> None:
    context = mlflow.pyfunc.PythonModelContext(
        artifacts={"pool": str(pool_folder)}, model_config={"base_model_id": "m-nowhere", "dtype": "float32"}
    )
    with pytest.raises(RegistryError, match="Set MLFLOW_TRACKING_URI to the registry that the pool comes from"):
        RoutedPool().load_context(context)
