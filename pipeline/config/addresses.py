"""Places of results: a folder, or an address (s3://bucket/runs), and what can be wrong with one before anybody is asked."""

import difflib
import re
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.config.core import digest, without_secrets
from pipeline.files import user_cache

_NATIVE = {"s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "local"}
"""Kinds of addresses that pyarrow reaches by itself; fsspec knows others."""

_BUCKETS = {"s3", "gs", "gcs", "abfs", "abfss"}
"""Those whose address begins with a bucket."""

_READ_ONLY = {"http", "https", "data", "github", "zip", "tar", "reference"}
"""Kinds of fsspec's where nothing can be written."""

_LEGAL = "!$&'()*+,;=:@-._~/%"
"""What the path of a URI may hold beside letters and digits."""


def is_address(place: str) -> bool:
    """Whether results go to an address (s3://, gs://), not to a folder."""
    return "://" in place


def output_place(place: str) -> str:
    """Returns the path of a folder, or an address; raises ValueError for an address that cannot be one."""
    scheme, separator, rest = place.partition("://")
    if not separator:
        scheme, colon, path = place.partition(":/")
        if colon and scheme in {*_NATIVE, "file"}:
            raise ValueError(f"an address has two slashes after its kind: {scheme}://{path}")
        return str(Path(place).expanduser()) if place.startswith("~") else place
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError("write file:///folder, with three slashes, or the folder alone")
        return rest
    if (fault := address_fault(place)) is not None:
        raise ValueError(fault)
    return place


def address_fault(address: str) -> str | None:
    """Returns why nothing can be written at an address, whatever lies there, and what to write instead; None if all is well.

    Stores know no folders: what a file system would make of `..`, they take for a name, or for another bucket.
    """
    scheme, _, path = without_secrets(address).partition("://")
    path = path.partition("?")[0]
    if scheme in _READ_ONLY:
        return f"nothing can be written at {scheme}://; name a store, like s3://bucket/runs"
    if scheme not in _NATIVE and scheme not in (known := _known_to_fsspec()):
        near = difflib.get_close_matches(scheme, [*sorted(_NATIVE), *sorted(known)], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"nobody knows {scheme}:// (s3://, gs:// and what pyarrow and fsspec reach){hint}"
    if not path.strip("/") or (scheme in _BUCKETS and path.startswith("/")):
        return f"name a place there, like {scheme}://bucket/runs"
    if {"", ".", ".."} & {*unquote(path).strip("/").split("/")}:
        return "a store takes `//`, `.` and `..` for names; write its path without them"
    if scheme in _NATIVE and (legal := quote(path, safe=_LEGAL)) != path:
        return f"write what a URI cannot hold with %: {scheme}://{legal}"
    return None


def _known_to_fsspec() -> set[str]:
    from fsspec.registry import known_implementations, registry

    return {*known_implementations, *registry}


def working_folder(address: str) -> Path:
    """Returns the folder of this machine in which the results at an address are made: a copy that can be fetched again."""
    plain = without_secrets(address).rstrip("/")
    name = re.sub(r"[^A-Za-z0-9]+", "-", plain.partition("://")[2])[-40:].strip("-")
    return user_cache("outputs") / f"{name}-{digest(plain)}"
