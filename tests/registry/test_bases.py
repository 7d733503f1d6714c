"""Bases of a registry: in place where they lie here, fetched once where not, with what they need to be loaded as here."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from pipeline.config import BaseModelConfig
from pipeline.models import checkpoints
from pipeline.models.bases import load_base
from pipeline.models.checkpoints import files_of, fingerprint
from pipeline.registry.bases import base_folder, find_base, register_base
from pipeline.registry.experts import register_expert
from pipeline.registry.pools import register_pool, served_settings
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import open_tracking, tracked_run
from pipeline.registry.versions import logged_model, logged_model_id
from pipeline.routing import Pool
from tests.registry.conftest import Created, MakeExpert


@pytest.fixture(scope="module")
def server(created: Created, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server that hands out its files itself, in place of the database; yields where they lie."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(created.path, folder / "mlflow.db")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "files"), "--port", str(port), "--workers", "1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    before = mlflow.get_tracking_uri()
    try:
        until = time.monotonic() + 120
        while True:
            try:
                open_tracking(f"http://127.0.0.1:{port}", "elsewhere")
                break
            except RegistryError:
                assert time.monotonic() < until, (folder / "log").read_text()
        yield folder / "files"
    finally:
        mlflow.set_tracking_uri(before)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.ray  # not Ray, but a server that takes its time to start
def test_a_base_elsewhere_is_fetched_once_and_checked(
    server: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "bases")
    with tracked_run(open_tracking(mlflow.get_tracking_uri(), "elsewhere"), "demo", "run"):
        model_id = logged_model_id(register_base(BaseModelConfig(path=str(tiny_folder))))
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(lambda _: base_folder(model_id), range(4)))
    assert folder.is_relative_to(tmp_path / "bases")
    assert fingerprint(folder) == fingerprint(tiny_folder)
    assert not [entry for entry in folder.parent.iterdir() if "staging" in entry.name]
    fetched = folder.stat().st_ino
    assert base_folder(model_id).stat().st_ino == fetched
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert fingerprint(base_folder(model_id)) == fingerprint(tiny_folder), "a damaged copy is fetched again"
    (folder / "config.json").unlink()
    (original,) = server.rglob("config.json")
    original.write_text("{}")
    with pytest.raises(RegistryError, match="is not the one that was registered"):
        base_folder(model_id)
    shutil.rmtree(original.parent)
    with pytest.raises(RegistryError, match="this pool needs the base .*, which http://.* does not have"):
        base_folder(model_id)


def test_own_code_is_registered_where_it_runs(experiment: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    (folder / "modeling_own.py").write_text("OWN = 1\n")
    assert fingerprint(folder) == fingerprint(tiny_folder), "code that does not run determines no answer"
    config = BaseModelConfig(path=str(folder), revision="abc")
    with tracked_run(experiment, "demo", "run"):
        plain = register_base(config)
        with_code = register_base(config.model_copy(update={"trust_remote_code": True}))
        assert register_base(config).version == plain.version
        (folder / "modeling_own.py").write_text("OWN = 2\n")
        changed = register_base(config.model_copy(update={"trust_remote_code": True}))
    assert len({plain.version, with_code.version, changed.version}) == 3
    names = [{file.name for file in base_folder(logged_model_id(v)).iterdir()} for v in (plain, with_code)]
    assert names[1] - names[0] == {"modeling_own.py"}
    assert logged_model(plain).params["revision"] == "abc"
    assert {file.name for file in files_of(folder, code=True)} - {file.name for file in files_of(folder)} == {
        "modeling_own.py"
    }


def test_a_pool_is_loaded_elsewhere_as_here(
    experiment: str, make_expert: MakeExpert, make_pool: Callable[..., Pool], tiny_folder: Path, tmp_path: Path
) -> None:
    base = BaseModelConfig(
        path=str(tiny_folder), dtype="bfloat16", attention="eager", max_tiles=3, trust_remote_code=True
    )
    expert = make_expert("digits", "e1")
    with tracked_run(experiment, "demo", "run"):
        versions = {"digits": register_expert("untrained", expert.save(tmp_path / "digits"))}
        version = register_pool(make_pool(expert), base, name="demo", digest="p", experts=versions)
    settings = served_settings(version)
    assert settings.pop("base_model_id")
    assert settings == {
        "expert_memory": None, "dtype": "bfloat16", "attention": "eager", "max_tiles": 3, "trust_remote_code": True,
    }  # fmt: skip


def test_a_base_with_its_own_code_runs_it_elsewhere(experiment: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(
        "from transformers import InternVLForConditionalGeneration\n\n\n"
        "class Own(InternVLForConditionalGeneration):\n    own = True\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    trusted = BaseModelConfig(path=str(folder), trust_remote_code=True)
    with tracked_run(experiment, "demo", "run"):
        version = register_base(trusted)
    shutil.rmtree(folder)
    there = trusted.model_copy(update={"path": str(base_folder(logged_model_id(version)))})
    assert load_base(there).model.own
    assert not hasattr(load_base(there.model_copy(update={"trust_remote_code": False})).model, "own")
    assert find_base("own", fingerprint(Path(there.path))).version == version.version
    (Path(there.path) / "modeling_own.py").write_text("raise SystemExit('not what was registered')\n")
    with pytest.raises(RegistryError, match="the Python files of this base are not those that were registered"):
        base_folder(logged_model_id(version))
