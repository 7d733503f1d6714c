"""Folders at addresses: on a server that speaks S3, and on a file system that has neither S3's whole files nor its lists."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.benchmark.tools.s3_server import KEY, SECRET, new_bucket, s3_server
from pipeline.storage.remote import RemoteFolder


@pytest.fixture(scope="session")
def s3() -> Iterator[tuple[str, str]]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["s3", "local", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteFolder:
    """An empty folder: pyarrow's S3, pyarrow's local files, and a file system of fsspec."""
    if request.param == "local":
        return RemoteFolder(f"local://{tmp_path}.elsewhere/there")
    if request.param == "memory":
        return RemoteFolder(f"memory://{tmp_path.name}/there")
    address, options = request.getfixturevalue("s3")
    return RemoteFolder(f"s3://{KEY}:{SECRET}@{new_bucket(address)}/there{options}")
