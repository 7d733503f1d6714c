"""Resolves a path, folder, glob or URI to files and their format.

Independent of their contents.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow.fs as fs

from pipeline.config import SourceConfig, without_secrets
from pipeline.data.demo.files import SCHEME, demo_address, demo_part
from pipeline.data.errors import StreamError
from pipeline.data.sources.formats import format_of
from pipeline.data.sources.storage import locate, unreachable
from pipeline.storage.mirror import Folder

_HIDDEN = re.compile(r"(^|/)[._]")
_FORMATS = "parquet, jsonl, json, tsv or csv"


def resolve(source: SourceConfig, folder: Folder) -> tuple[fs.FileSystem, list[fs.FileInfo], str]:
    """Finds a source's files: filesystem, files in order of their names, and format.

    `folder` is where demo data are written. Folders are searched recursively, without hidden files (`.`, `_`).
    Raises StreamError when there are no files, when their formats differ, or when storage cannot be reached.
    """
    path = demo_address(source.path, folder) if source.path.startswith(SCHEME) else source.path
    base, pattern = split_glob(path)
    filesystem, root = locate(base)
    try:
        info = filesystem.get_file_info(root)
        infos = [info] if info.type == fs.FileType.File else []
        if info.type == fs.FileType.Directory:
            infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except Exception as error:  # noqa: BLE001 - the hub's filesystem (hf://) raises errors of its HTTP client
        raise unreachable(source.path, error) from None
    files = sorted((file for file in infos if file.type == fs.FileType.File), key=lambda file: file.path)
    if info.type == fs.FileType.Directory:
        inside = {file.path: file.path[len(root.rstrip("/")) + 1 :] for file in files}
        files = [file for file in files if not _HIDDEN.search(inside[file.path])]
        files = [file for file in files if matches(pattern, inside[file.path].split("/"))]
    by_format: dict[str, list[fs.FileInfo]] = {}
    for file in files:
        by_format.setdefault(format_of(file.path), []).append(file)
    if source.format != "auto":
        by_format = {source.format: by_format.get(source.format, files)}
    by_format.pop("", None)
    if not pattern and len(by_format) > 1:
        by_format.pop("json", None)  # dataset_info.json and the like, which describe the other files
    shown = without_secrets(source.path)
    if not any(by_format.values()):
        raise StreamError(f"{shown}: no {_FORMATS} files there (is the path right, and mounted here?)")
    if len(by_format) > 1:
        formats = sorted(by_format)
        raise StreamError(
            f"{shown}: {' and '.join(formats)} mixed; give a glob such as {shown}/*.{formats[-1]}, or `format`"
        )
    ((file_format, files),) = by_format.items()
    return filesystem, files, file_format


def check_there(source: SourceConfig, folder: Folder) -> None:
    """Raises StreamError where a source has no files; reads none of them, and writes none of the demo's."""
    if source.path.startswith(SCHEME):
        demo_part(source.path)
    else:
        resolve(source, folder)


def split_glob(path: str) -> tuple[str, list[str]]:
    """Splits a path or URI into its folder before the first part with a wildcard, and the parts from there on.

    A path that exists has no wildcards.
    """
    uri, mark, query = path.partition("?") if "://" in path else (path, "", "")
    parts = uri.split("/")
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    if first == len(parts) or ("://" not in path and Path(path).exists()):
        return path, []
    base = "/".join(parts[:first]) or ("/" if uri.startswith("/") else ".")
    return base + mark + query, parts[first:]


def matches(pattern: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the parts of a path match a pattern: `*` within a name, `**` over folders; a folder matches all in it."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(matches(pattern[1:], names[i:]) for i in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and matches(pattern[1:], names[1:])
