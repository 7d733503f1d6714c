"""Addresses of a registry: a SQLite file, a database that is written to directly, or MLflow's server.

`registry.uri`, `--registry` and MLFLOW_TRACKING_URI take the same addresses; what is wrong with one names where it was given.
"""

import os
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from pipeline.config import without_secrets
from pipeline.registry.databases import DRIVERS, MODULES, is_database
from pipeline.registry.retries import REGISTRY_URI, RegistryError

SQLITE = "sqlite:///"

SQLITE_HEADER = b"SQLite format 3\0"
"""First bytes of every SQLite database."""

RESTORE = "restore the file from a copy, or move it away: the next start makes a new one"

SERVERS = ("http://", "https://")

KINDS = f"{SQLITE}<file>, postgresql://<host>/<database>, mysql+pymysql://<host>/<database> or http(s)://<server>"


def database_path(uri: str, setting: str = REGISTRY_URI) -> Path | None:
    """Returns the absolute path of a SQLite file; None for a database or a server. Raises RegistryError for the rest."""
    if uri.startswith(SQLITE):
        name = uri.removeprefix(SQLITE)
        if not name or Path(name).is_dir():
            raise RegistryError(
                f"{setting}: {uri!r} names {'a folder' if name else 'no file'}; "
                f"name the database's file, like {SQLITE}{Path(name) / 'mlflow.db'}"
            )
        return Path(name).resolve()
    if uri.startswith(SERVERS):
        _server(uri, setting)
    elif is_database(uri):
        _check_database_address(uri, setting)
    else:
        raise RegistryError(f"{setting}: {without_secrets(uri)!r} is no registry; write {KINDS}")
    return None


def _check_database_address(uri: str, setting: str) -> None:
    """Raises RegistryError for an address without host or database, and where its driver is not installed."""
    shown, example = without_secrets(uri), f"write it like {uri.partition(':')[0]}://user@db.example.com/mlflow"
    try:
        url: URL = make_url(uri)
        dialect = url.get_dialect()
    except NoSuchModuleError:
        raise RegistryError(f"{setting}: {shown!r} names an unknown driver; write {KINDS}") from None
    except (ArgumentError, ValueError):
        raise RegistryError(f"{setting}: {shown!r} cannot be read; {example}") from None
    if not url.database:
        raise RegistryError(f"{setting}: {shown!r} names no database; {example}")
    if (packages := DRIVERS.get(dialect.driver)) is None:
        raise RegistryError(f"{setting}: {shown!r} names a driver that was never tried here; write {KINDS}")
    if find_spec(MODULES.get(dialect.driver, dialect.driver)) is None:
        other = ", or write mysql+pymysql://" * (dialect.driver == "mysqldb")
        raise RegistryError(f"{setting}: {shown} takes a package that is not installed: pip install {packages}{other}")


def with_credentials_aside(uri: str, setting: str = REGISTRY_URI) -> str:
    """Returns a server's address without user and password, which MLflow then finds in its environment variables."""
    parts = _server(uri, setting)
    if parts.username:
        password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
        if not password:
            raise RegistryError(
                f"{setting} names a user without a password; set MLFLOW_TRACKING_PASSWORD in the environment, or leave "
                "the user out"
            )
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = password
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _server(uri: str, setting: str) -> SplitResult:
    """Returns the parts of a server's address; raises RegistryError if it names no host, or a port that is none."""
    example = "write it like http://mlflow.example.com:5000"
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port  # asking for the port checks it
    except ValueError:
        raise RegistryError(f"{setting}: host or port of {without_secrets(uri)!r} is none; {example}") from None
    if not host:
        raise RegistryError(f"{setting}: {without_secrets(uri)!r} names no host; {example}")
    return parts


def check_sqlite(database: Path, setting: str = REGISTRY_URI) -> None:
    """Raises RegistryError for a file that is not a SQLite database; a missing or empty file passes."""
    try:
        with database.open("rb") as file:
            head = file.read(len(SQLITE_HEADER))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RegistryError(f"{setting}: {database} cannot be read: {error.strerror}; {RESTORE}") from None
    damaged = bool(head) and head != SQLITE_HEADER
    if not damaged:
        try:  # MLflow would retry a damaged one for minutes
            with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
                opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:  # such as one that is locked: MLflow's own matter
            return
        except sqlite3.DatabaseError:
            damaged = True
    if damaged:
        raise RegistryError(f"{setting}: {database} is no SQLite database, or damaged; {RESTORE}")


LOOPBACK, UI_PORT = "127.0.0.1", 5000
"""Where MLflow's pages are shown by default."""

UI_URI = "MLFLOW_BACKEND_STORE_URI"
"""Environment variable in which MLflow's pages find their database: a command line is everybody's to read."""


def ui_command(uri: str, *, host: str = LOOPBACK, port: int = UI_PORT) -> list[str]:
    """Returns the command line that shows a registry without a server in the browser, at http://<host>:<port>.

    For a database its address, which may hold a password, must be in the environment variable UI_URI.
    """
    database = database_path(uri)
    store = [] if database is None else ["--backend-store-uri", f"{SQLITE}{database}"]
    return ["mlflow", "ui", *store, "--host", host, "--port", str(port), "--workers", "1"]
