"""Nodes on this machine that do not see each other's files, and meet at an address all the same."""

from pathlib import Path

import pytest
import ray

from cluster.local import connect
from cluster.probe import Question
from cluster.survey import ask_nodes, judge_base, judge_storage
from jobs.benchmark.tools.nodes_apart import check_namespaces, nodes_apart
from jobs.benchmark.tools.ray_head import HeadError
from jobs.benchmark.tools.s3_server import KEY, SECRET, new_bucket, s3_server
from pipeline.storage.mirror import Mirror
from pipeline.storage.remote import RemoteFolder
from tests.cluster.conftest import ROOT

pytestmark = pytest.mark.ray


def test_they_see_no_file_of_the_head(tmp_path: Path) -> None:
    try:
        check_namespaces()
    except HeadError as error:
        pytest.skip(str(error))
    base, folder = tmp_path / "base", Mirror(tmp_path)
    base.mkdir()
    (base / "model.safetensors").write_text("12345")
    ray.shutdown()  # another module's may still run
    with s3_server() as (server, options), nodes_apart((1, 1, 1), [tmp_path], {"PYTHONPATH": str(ROOT)}) as head:
        output = Mirror(tmp_path, RemoteFolder(f"s3://{KEY}:{SECRET}@{new_bucket(server)}/runs{options}"))
        connect(head.gcs)
        try:
            here = ask_nodes(Question(base=str(base)), folder)
            there = ask_nodes(Question(), output)
        finally:
            ray.shutdown()
    assert len(here.others) == 2
    assert judge_base(here, str(base)).text.count("no such file or directory") == 2
    assert judge_storage(here, folder).text.count("no such file or directory") == 2
    assert judge_storage(there, output).status == "ok"
