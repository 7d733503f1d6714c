"""What a node is asked before a job: its versions, and whether it reaches base, storage and registry.

Sent to the nodes as it stands, since it finds out what a node lacks: it imports the standard library, and all else only where
it is asked for it. Answers are plain values.
"""

import hashlib
import importlib.util
import json
import platform
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SECONDS = 10.0
"""Longest wait for an answer from the network."""

SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
"""A request that MLflow answers to those whom it lets in; its page for health checks is open to all hosts and users."""

CHECKPOINT = {".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf"}
"""Files of a base that loading needs."""


@dataclass(frozen=True)
class Question:
    """What all nodes are asked."""

    packages: tuple[str, ...] = ()
    """Distributions whose versions must be equal."""
    code: tuple[str, ...] = ()
    """Packages whose source must be equal."""
    base: str | None = None
    """Folder, file, hub id or URI of the base; None: it ships with the code."""
    revision: str | None = None
    """Of a hub id."""
    storage: str | None = field(default=None, repr=False)
    """Folder or address with a file `asked`, in which every node leaves a file of its own."""
    registry: str | None = None
    """Address of MLflow's server, without user and password."""


@dataclass(frozen=True)
class Answer:
    """What one node answers."""

    python: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    """By distribution; None where it is not installed."""
    code: str | None = None
    """Digest of the source; None where a package is missing."""
    files: dict[str, int] = field(default_factory=dict)
    """Sizes of the base's files in bytes, by name."""
    notes: dict[str, str] = field(default_factory=dict)
    """What is worth a word, by what was asked: `base`."""
    errors: dict[str, str] = field(default_factory=dict)
    """What is wrong, by what was asked: `base`, `storage`, `registry`."""


def look(question: Question, name: str) -> dict[str, Any]:
    """Returns the answer of the node `name`, as the fields of an Answer."""
    files: dict[str, int] = {}
    notes: dict[str, str] = {}
    errors: dict[str, str] = {}
    for what, asked, find in (
        ("base", question.base, lambda: _base(question, files, notes)),
        ("storage", question.storage, lambda: _storage(question, name)),
        ("registry", question.registry, lambda: _registry(question)),
    ):
        if asked is None:
            continue
        try:
            find()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this node's answer
            errors[what] = _reason(error)
    return {
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in question.packages},
        "code": _code(question.code),
        "files": files,
        "notes": notes,
        "errors": errors,
    }


def _reason(error: Exception) -> str:
    """Returns an error's text in one line; that of the system alone, where it is the system's."""
    reason = getattr(error, "reason", None)
    error = reason if isinstance(reason, OSError) else error
    system, file = getattr(error, "strerror", None), getattr(error, "filename", None)
    text = str(system).lower() if system else next(iter(str(error).splitlines()), type(error).__name__)
    return f"{file}: {text}" if file else text


def _version(package: str) -> str | None:
    """Returns the release of a distribution; builds of it for other hardware (`+cpu`) are the same one."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def _code(packages: tuple[str, ...]) -> str | None:
    """Returns a digest of all Python files of packages."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        root = Path(next(iter(spec.submodule_search_locations)))
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _base(question: Question, files: dict[str, int], notes: dict[str, str]) -> None:
    """Adds the base's files on this node; raises an error where they cannot be read."""
    base = question.base or ""
    path = Path(base).expanduser()
    if "://" in base:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(base)
        found = filesystem.glob(f"{root.rstrip('/')}/*.safetensors")
        if not found:
            raise FileNotFoundError("no *.safetensors there")
        files.update({Path(file).name: int(filesystem.info(file)["size"]) for file in found})
        return
    if path.exists() or base.count("/") != 1 or base.startswith((".", "/", "~")):
        for file in sorted(path.iterdir()) if not path.is_file() else [path]:
            if file.suffix in CHECKPOINT and file.is_file():
                with file.open("rb") as opened:
                    opened.read(1)
                files[file.name] = file.stat().st_size
        return
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(base, "config.json", revision=question.revision), str):
        HfApi().model_info(base, revision=question.revision, timeout=SECONDS)
        notes["base"] = "not in its cache yet, is downloaded"


def _storage(question: Question, name: str) -> None:
    """Reads what was asked, and leaves the same text under the name of this node."""
    if "://" in (question.storage or ""):
        from pipeline.storage.remote import RemoteFolder

        remote = RemoteFolder(question.storage or "")
        content = remote.read("asked")
        if content is None:
            raise FileNotFoundError("what this job has written there is not found: it is another storage of that name")
        remote.write(name, content)
        return
    folder = Path(question.storage or "")
    (folder / name).write_text((folder / "asked").read_text())


def _registry(question: Question) -> None:
    """Raises an error where the server does not answer, or refuses this host; that it wants a password is an answer."""
    try:
        with urllib.request.urlopen(f"{(question.registry or '').rstrip('/')}{SEARCH}", timeout=SECONDS) as answer:
            json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return
        text = error.read(200).decode(errors="replace").strip().partition("\n")[0]
        raise ConnectionError(f"it answers {error.code}{f': {text}' if text and '<' not in text else ''}") from None
