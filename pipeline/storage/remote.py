"""A folder at an address (s3://, gs://, whatever pyarrow or fsspec reach), as files that are written, read and listed.

An object store has neither folders, renames nor locks: a file appears whole, and nothing else is sure. What is built on this
room needs no more. Independent of what the files hold.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from posixpath import dirname, normpath
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs as fs

from pipeline.config import address_fault, without_secrets
from pipeline.errors import UserError
from pipeline.files import atomic_file

AT_ONCE = 8
"""Files that are copied at the same time."""

_WHOLE = {"s3", "gcs", "abfs"}
"""Kinds of storage where a file appears when all of it is written, and that need no folders."""

_PATIENCE = 60
"""Retry limit of Google's storage in seconds; its default is 15 minutes."""

_CHUNK = 4 << 20

_REMEDIES = (
    (("unexpected query parameter",), "it has an option that such storage does not know", "correct it, or leave it out"),
    (("no_such_bucket", "nosuchbucket", "bucket does not exist"), "there is no such bucket", "make it, or correct its name"),
    (
        ("could not resolve credentials", "no credentials", "unable to locate credentials", "nocredentials",
         "missing credentials", "could not find default credentials"),
        "there are no credentials here",
        "set them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
        "GOOGLE_APPLICATION_CREDENTIALS), on every node",
    ),
    (
        ("invalid_access_key_id", "invalidaccesskeyid", "signature_does_not_match", "signaturedoesnotmatch", "expiredtoken",
         "invalid_signature", "unrecognized_client", "invalidtoken", "expired_token", "invalid_client_token_id"),
        "the credentials are not accepted",
        "renew them in the environment, on every node",
    ),
    (
        ("access_denied", "accessdenied", "forbidden", "permission denied", "permission_denied", "http status 403"),
        "this may not be done there",
        "are there credentials here (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), and may they list, read, "
        "write and delete there?",
    ),
    (
        ("slow_down", "slowdown", "throttl", "too many requests", "service_unavailable", "service unavailable"),
        "it is asked too much at the moment",
        "the same command goes on later",
    ),
    (
        ("network_connection", "couldn't connect", "could not connect", "timeout", "timed out", "curlcode", "resolve host"),
        "it does not answer",
        "are its address (AWS_ENDPOINT_URL, or ?endpoint_override=) and region right, and does this machine reach it?",
    ),
)  # fmt: skip
"""What storage says, in lower case, what that means, and what to do."""

FAILURES = (OSError, ValueError, ImportError, RuntimeError, pa.ArrowException)
"""What file systems raise, pyarrow's and those of fsspec; their clients' errors are among them."""


class StorageError(UserError):
    """Storage that cannot be used; the message names the address, what is wrong, and the remedy."""


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turns what file systems raise into a StorageError that names the address, without its secrets."""
    try:
        yield
    except UserError:
        raise
    except FAILURES as error:
        raise _explained(uri, error) from None


def _explained(uri: str, error: BaseException) -> StorageError:
    shown, reason = without_secrets(uri), next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if isinstance(error, ImportError):
        return StorageError(f"{shown}: the package for this kind of storage is not installed: {reason}")
    if isinstance(error, NotImplementedError):
        return StorageError(
            f"{shown}: this kind of storage cannot do what is needed of it; choose another one ({reason})"
        )
    text = f"{type(error).__name__} {error}".lower()
    for marks, meaning, remedy in _REMEDIES:
        if any(mark in text for mark in marks):
            return StorageError(f"{shown}: {meaning}; {remedy} ({without_secrets(_in_short(reason))})")
    remedy = "are name, region and credentials right, and does this machine reach it?"
    return StorageError(f"{shown}: cannot be used: {without_secrets(reason)[:300]} ({remedy})")


def _in_short(reason: str) -> str:
    """Returns what AWS says of an error without the request that it says first, of others the beginning."""
    return reason[max(0, reason.find("AWS Error")) :].partition(" (Request ID")[0][:150]


@lru_cache
def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of an address and the path in it: pyarrow's own where it has one, else fsspec's.

    Raises what these raise; see `storage_errors`.
    """
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_PATIENCE}"
    try:
        return fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise
        unknown = error
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations, registry

    if uri.partition("://")[0] not in {*known_implementations, *registry}:
        raise unknown
    filesystem, path = url_to_fs(uri)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def joined(uri: str, name: str) -> str:
    """Returns the address of what is called `name` below an address, whose options it keeps; `..` leads out of it."""
    place, mark, options = uri.partition("?")
    scheme, _, path = place.partition("://")
    return f"{scheme}://{normpath(f'{path}/{name}')}{mark}{options}"


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address. Names are relative to it, with `/`; folders are there if they hold a file.

    Raises StorageError for what cannot be an address.
    """

    uri: str = field(repr=False)
    """May hold keys: `str()` is what people are shown."""

    def __post_init__(self) -> None:
        if (fault := address_fault(self.uri)) is not None:
            raise StorageError(f"{self}: {fault}")

    def __str__(self) -> str:
        return without_secrets(self.uri)

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(joined(self.uri, name))

    @property
    def filesystem(self) -> fs.FileSystem:
        """The file system that it lies on; raises StorageError where it cannot be opened."""
        with storage_errors(self.uri):
            return open_filesystem(self.uri)[0]

    @property
    def path(self) -> str:
        """Its path there."""
        with storage_errors(self.uri):
            return open_filesystem(self.uri)[1].rstrip("/")

    def check(self) -> None:
        """Writes, reads, lists and deletes a small file; raises StorageError for the first of these that fails."""
        name = f".probe-{uuid4().hex}"
        probe = self / name
        try:
            probe.write("probe", b"pointsman")
            if probe.read("probe") != b"pointsman" or "probe" not in probe.files():
                raise StorageError(f"{probe}: what is written there is not found again; is its storage consistent?")
            probe.delete_all()
        except StorageError as error:
            raise StorageError(str(error).replace(f"/{name}", "")) from None

    def files(self) -> dict[str, int]:
        """Returns the sizes of all files below it, by name."""
        return {info.path[len(self.path) + 1 :]: info.size or 0 for info in self._infos(fs.FileType.File, deep=True)}

    def folders(self) -> list[str]:
        """Returns the names of the folders that lie in it."""
        return sorted(info.base_name for info in self._infos(fs.FileType.Directory, deep=False))

    def _infos(self, kind: fs.FileType, *, deep: bool) -> list[fs.FileInfo]:
        with storage_errors(self.uri):
            try:
                infos = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=deep))
            except FileNotFoundError:  # a bucket that is missing is another error
                return []
            return [info for info in infos if info.type == kind]

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        with storage_errors(self.uri):
            return self.filesystem.get_file_info(f"{self.path}/{name}").type == fs.FileType.File

    def read(self, name: str) -> bytes | None:
        """Returns a file's bytes; None where there is none."""
        if not self.exists(name):
            return None
        try:
            with storage_errors(self.uri), self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
                return file.read()
        except StorageError:
            if not self.exists(name):  # deleted meanwhile
                return None
            raise

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, all of it or nothing."""
        with self._writing(name) as file:
            file.write(content)

    def upload(self, source: Path, name: str) -> None:
        """Copies a file of this machine there, all of it or nothing."""
        with source.open("rb") as opened, self._writing(name) as file:
            shutil.copyfileobj(opened, file, _CHUNK)

    @contextmanager
    def _writing(self, name: str) -> Iterator[pa.NativeFile]:
        target = f"{self.path}/{name}"
        with storage_errors(self.uri):
            if self.filesystem.type_name in _WHOLE:
                with self.filesystem.open_output_stream(target) as file:
                    yield file
                return
            folder = dirname(target)
            self.filesystem.create_dir(folder, recursive=True)
            staging = f"{folder}/.{uuid4().hex}"
            with self.filesystem.open_output_stream(staging) as file:
                yield file
            self.filesystem.move(staging, target)

    def download(self, name: str, target: Path) -> None:
        """Copies a file here, all of it or nothing; makes the folder if need be."""
        with (
            storage_errors(self.uri),
            atomic_file(target) as staging,
            self.filesystem.open_input_stream(f"{self.path}/{name}") as file,
            staging.open("wb") as opened,
        ):
            shutil.copyfileobj(file, opened, _CHUNK)

    def upload_folder(self, source: Path, *, last: str = "") -> None:
        """Copies all files below a folder of this machine there, `last` when all others are there."""
        names = [file.relative_to(source).as_posix() for file in sorted(source.rglob("*")) if file.is_file()]
        at_once(lambda name: self.upload(source / name, name), [name for name in names if name != last])
        if last in names:
            self.upload(source / last, last)

    def download_folder(self, target: Path, *, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Copies all files below it, whose name is `wanted`, into a folder of this machine."""
        at_once(lambda name: self.download(name, target / name), [name for name in self.files() if wanted(name)])

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files; those that are gone already are no error."""
        at_once(self._delete, list(names))

    def _delete(self, name: str) -> None:
        try:
            with storage_errors(self.uri):
                self.filesystem.delete_file(f"{self.path}/{name}")
        except StorageError:
            if self.exists(name):
                raise

    def delete_all(self) -> None:
        """Deletes all that lies in it, and the folder."""
        self.delete(self.files())
        with storage_errors(self.uri):
            if self.filesystem.get_file_info(self.path).type == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)


def at_once(work: Callable[[str], object], names: list[str]) -> None:
    """Does `work` for all names, several at a time; raises the first error when all have ended."""
    if len(names) < 2:
        for name in names:
            work(name)
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(names))) as pool:
        for done in [pool.submit(partial(work, name)) for name in names]:
            done.result()
