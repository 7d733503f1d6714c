"""Access to files in local folders and URIs (s3://, gs://, file://) through pyarrow's filesystems.

Image paths are checked here: none may lead out of its folder.
"""

import posixpath
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as fs

from pipeline.config import without_secrets
from pipeline.data.errors import BadRow, StreamError, first_line, printable
from pipeline.storage.remote import open_filesystem

MAX_FILE = 1 << 30
"""Bytes of the largest image file that is read."""

_SCHEMES = {"local": "file", "s3": "s3", "gcs": "gs"}


def locate(path: str) -> tuple[fs.FileSystem, str]:
    """Returns the filesystem of a local path or URI, and the path within it.

    Raises StreamError for an unknown kind of URI and where the filesystem cannot be reached.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).expanduser().resolve())
    try:
        return open_filesystem(path)
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise unreachable(path, error) from None


def unreachable(path: str, error: BaseException) -> StreamError:
    """Returns the StreamError for a filesystem's `error`."""
    return StreamError(
        f"{without_secrets(path)}: cannot be read: {first_line(error)} (are name, region and credentials right, and does "
        "this machine reach it?)"
    )


@dataclass(frozen=True)
class ImageFolder:
    """The folder that image paths are relative to."""

    filesystem: fs.FileSystem
    path: str

    def read(self, name: str) -> bytes:
        """Returns the bytes of an image file; raises BadRow where there is none, or it lies outside this folder.

        A path may be relative or absolute (or a URI of the same storage), but must lead into the folder: a row must not
        make the job read whatever the machine can read. Links inside the folder are followed.
        """
        shown = repr(printable(name, 100))
        scheme, separator, rest = name.partition("://")
        if separator and scheme != _SCHEMES.get(self.filesystem.type_name):
            raise BadRow(
                f"image {shown}: its rows lie elsewhere than {scheme}://; name the images' folder as image_root"
            )
        path = posixpath.normpath(rest if separator else posixpath.join(self.path, name))
        if not path.startswith(self.path.rstrip("/") + "/"):
            raise BadRow(
                f"image {shown} lies outside of {self.path}; a folder with all images can be named as image_root"
            )
        try:
            with self.filesystem.open_input_file(path) as file:
                if file.size() > MAX_FILE:
                    raise BadRow(f"image file {shown} has {file.size():,} bytes, {MAX_FILE:,} are read at most")
                return file.read()
        except BadRow:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise BadRow(f"image file {shown} {self._why(path, error)}") from None

    def _why(self, path: str, error: BaseException) -> str:
        """Returns why a file cannot be opened; called only on errors, since it costs a round trip."""
        try:
            file_type = self.filesystem.get_file_info(path).type
        except (OSError, ValueError, pa.ArrowException):
            file_type = fs.FileType.Unknown
        reasons = {fs.FileType.NotFound: f"does not exist in {self.path}", fs.FileType.Directory: "is a folder"}
        return reasons.get(file_type, f"cannot be read: {first_line(error)}")
