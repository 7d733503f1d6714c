"""A server that speaks S3, in this process, for tests and benchmarks of results at an address."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import requests

from pipeline.errors import UserError

KEY, SECRET = "AKIATESTKEY", "testsecret"


class NoServerError(UserError):
    """The package of the server is not installed."""


@contextmanager
def s3_server() -> Iterator[tuple[str, str]]:
    """Yields the address of a server, and what makes an `s3://` URI lead to it; raises NoServerError without moto."""
    try:
        from moto.server import ThreadedMotoServer  # among the packages for tests
    except ImportError:
        raise NoServerError("moto, a server that speaks S3, is not installed: pip install 'moto[server]'") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}", f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    finally:
        server.stop()


def new_bucket(address: str) -> str:
    """Makes a bucket of a new name, and returns it."""
    name = f"bucket-{uuid4().hex[:8]}"
    requests.put(f"{address}/{name}", timeout=10).raise_for_status()
    return name
