"""What nodes answer and how it is judged; the node asked is this machine, the others are made of answers. No Ray."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster import probe
from cluster.preflight import PreflightError
from cluster.probe import Answer, Question
from cluster.survey import (
    CODE,
    PACKAGES,
    Finding,
    Survey,
    judge_answers,
    judge_base,
    judge_registry,
    judge_storage,
    judge_versions,
    raise_failed,
)
from pipeline.storage.mirror import Mirror
from pipeline.storage.remote import RemoteFolder

HERE = Answer(
    "3.11.9", {"ray": "2.60.0", "pointsman": "0.1.0"}, "aaaaaaaa", {"config.json": 10, "model.safetensors": 10**9}
)
NODE = "node 1234abcd at 10.0.0.2"


def look(**question: str) -> Answer:
    return Answer(**probe.look(Question(**question), "me"))


def others(*answers: Answer | str) -> Survey:
    return Survey(HERE, dict(zip((NODE, "another node"), answers, strict=False)))


def test_versions_and_code_of_this_machine() -> None:
    answer = Answer(**probe.look(Question((*PACKAGES, "no-such-package"), CODE), "me"))
    assert answer.versions["no-such-package"] is None
    assert all(answer.versions[package] for package in PACKAGES if package != "pointsman")
    assert answer.code == look().code or len(answer.code or "") == 8
    assert Answer(**probe.look(Question(code=("no_such_package",)), "me")).code is None


def test_a_changed_line_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packaged"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    digests = set()
    for text in ("a = 1", "a = 2"):
        (package / "__init__.py").write_text(text)
        digests.add(Answer(**probe.look(Question(code=("packaged",)), "me")).code)
    assert len(digests) == 2


def test_a_base_in_a_folder(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "notes.md"):
        (tmp_path / name).write_text("12345")
    assert look(base=str(tmp_path)).files == {"config.json": 5, "model.safetensors": 5}
    assert look(base=f"file://{tmp_path}").files == {"model.safetensors": 5}
    missing = look(base=str(tmp_path / "missing"))
    assert missing.errors["base"] == f"{tmp_path}/missing: no such file or directory"


def test_a_storage_is_read_and_written(tmp_path: Path) -> None:
    assert "no such file" in look(storage=str(tmp_path)).errors["storage"]
    (tmp_path / "asked").write_text("x")
    assert look(storage=str(tmp_path)).errors == {}
    assert (tmp_path / "me").read_text() == "x"


def test_a_storage_at_an_address_is_read_and_written(tmp_path: Path) -> None:
    uri = f"local://{tmp_path}/there"
    assert "it is another storage of that name" in look(storage=uri).errors["storage"]
    RemoteFolder(uri).write("asked", b"this")
    assert look(storage=uri).errors == {}
    assert RemoteFolder(uri).read("me") == b"this"
    told = look(storage="s3://key:secret@nobody/x?endpoint_override=127.0.0.1:9&scheme=http&region=x").errors["storage"]
    assert "it does not answer" in told
    assert "secret" not in told


def test_an_address_that_a_node_does_not_reach() -> None:
    there = Mirror(Path("/here"), RemoteFolder("s3://key:secret@bucket/runs"))
    survey = others(replace(HERE, errors={"storage": "s3://bucket/runs: this may not be done there"}), HERE)
    found = judge_storage(survey, there)
    assert found.status == "failed"
    assert found.text == f"output=s3://bucket/runs: {NODE}: s3://bucket/runs: this may not be done there"
    assert "credentials in the environment that its Ray was started in" in str(found.remedy)
    assert judge_storage(others(HERE, HERE), there).text == "s3://bucket/runs: written on 3 nodes, and seen on all"


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, object]]]:
    """A server and what it answers: MLflow's own is started by other tests, and takes ten seconds."""
    answer: dict[str, object] = {"code": 200, "text": "{}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(str(answer["code"])))
            self.end_headers()
            self.wfile.write(str(answer["text"]).encode())

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", answer
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "text", "error"),
    [
        (200, "{}", None),
        (401, "You are not authenticated.", None),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "it answers 403: Invalid Host header"),
        (502, "<html>", "it answers 502"),
    ],
)
def test_a_registry_answers(server, code, text, error) -> None:
    address, answer = server
    answer.update(code=code, text=text)
    found = look(registry=address).errors.get("registry")
    assert found == error if error is None else str(found).startswith(error)


def test_a_registry_is_away() -> None:
    assert look(registry="http://127.0.0.1:9").errors["registry"] == "connection refused"


def test_equal_nodes_are_told_in_a_line() -> None:
    assert judge_versions(others(HERE)) == Finding(
        "versions", "Python 3.11.9, ray 2.60.0, pointsman 0.1.0, code aaaaaaaa on 2 nodes"
    )
    assert judge_base(others(HERE), "/base").text == "/base: 1.00 GB on 2 nodes"
    assert judge_storage(others(HERE), Path("/runs")).text == "/runs: written on 2 nodes, and seen on all"
    assert judge_storage(Survey(HERE, {}), Path("/runs")).text == "/runs: written on 1 node"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"python": "3.12.1"}, "Python 3.12.1 (here 3.11.9)"),
        (
            {"versions": {"ray": "2.59.0", "pointsman": None}},
            "ray 2.59.0 (here 2.60.0), pointsman is missing (here 0.1.0)",
        ),
        ({"code": "bbbbbbbb"}, "the code of pointsman is another"),
        ({"code": None}, "the code of pointsman is missing"),
    ],
)
def test_a_node_with_other_versions(change, told) -> None:
    found = judge_versions(others(HERE, replace(HERE, **change)))
    assert (found.status, found.text) == ("failed", f"another node: {told}")


def test_a_base_that_another_node_lacks() -> None:
    found = judge_base(others(replace(HERE, files={}, errors={"base": "/base: no such file or directory"})), "/base")
    assert (found.status, found.text) == ("failed", f"base.path=/base: {NODE}: /base: no such file or directory")
    found = judge_base(others(replace(HERE, files=HERE.files | {"model.safetensors": 5})), "/base")
    assert found.text == f"base.path=/base: {NODE}: other files than here: model.safetensors"


def test_a_base_that_is_downloaded_is_no_failure() -> None:
    hub = replace(HERE, files={})
    asked = Survey(hub, {NODE: replace(hub, notes={"base": "not there yet"})})
    assert judge_base(asked, "org/base").text == "org/base: found by 2 nodes; downloaded on 1 of them first"


def test_a_folder_that_only_has_the_same_name() -> None:
    found = judge_storage(replace(others(HERE), unseen=(NODE,)), Path("/runs"))
    assert found.status == "failed"
    assert found.text == f"output=/runs: {NODE}: what it writes is not seen here: it has another folder of that name"


def test_a_registry_out_of_reach_of_workers_is_a_warning_alone() -> None:
    away = replace(HERE, errors={"registry": "it answers 403: Invalid Host header"})
    found = judge_registry(others(away), "http://mlflow:5000")
    assert (found.status, "--allowed-hosts" in (found.remedy or "")) == ("warning", True)
    assert judge_registry(Survey(away, {}), "http://mlflow:5000").status == "failed"


def test_what_fails_is_one_error_with_all_remedies() -> None:
    silent = judge_answers(others("no answer for 120 s"))
    assert [(finding.status, finding.text) for finding in silent] == [("failed", f"{NODE}: no answer for 120 s")]
    raise_failed([Finding("a", "well"), Finding("b", "so so", "warning", "look")])
    with pytest.raises(PreflightError, match=r"^first\n    mend it\nsecond\n    mend that$"):
        raise_failed([Finding("a", "first", "failed", "mend it"), Finding("b", "second", "failed", "mend that")])
