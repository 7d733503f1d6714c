"""Copies of a whole registry without its artifacts: of a SQLite file, or of a PostgreSQL database."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, NullPool, create_engine, make_url, text

from pipeline.registry.addresses import SQLITE
from pipeline.registry.databases import is_database


@contextmanager
def new_registry(server: str | None, folder: Path) -> Iterator[str]:
    """Yields the address of a new registry: a file in `folder`, or a database of a PostgreSQL `server`, there until the end."""
    if server is None:
        yield f"{SQLITE}{folder / 'mlflow.db'}"
        return
    uri = _sibling(server, "pointsman_faults")
    _make(uri, "")
    try:
        yield uri
    finally:
        with _connected(server) as connection:
            names = connection.execute(text("SELECT datname FROM pg_database WHERE datname LIKE 'pointsman\\_faults%'"))
            for name in names.scalars().all():
                connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))


def copied(uri: str, name: str) -> str:
    """Copies a registry that nobody writes to now, and returns the address of the copy `name`."""
    if not is_database(uri):
        whole = Path(uri.removeprefix(SQLITE))
        return f"{SQLITE}{shutil.copyfile(whole, whole.with_name(f'{name}.db'))}"
    copy, source = _sibling(uri, f"pointsman_faults_{name}"), str(make_url(uri).database)
    with _connected(_sibling(uri, "postgres")) as connection:  # a template must have no other connection
        ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :source"
        connection.execute(text(ends), {"source": source})
    _make(copy, f'TEMPLATE "{source}"')
    return copy


def _make(uri: str, how: str) -> None:
    with _connected(_sibling(uri, "postgres")) as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{make_url(uri).database}" WITH (FORCE)'))
        connection.execute(text(f'CREATE DATABASE "{make_url(uri).database}" {how}'))


def _sibling(uri: str, database: str) -> str:
    return make_url(uri).set(database=database).render_as_string(hide_password=False)


@contextmanager
def _connected(uri: str) -> Iterator[Connection]:
    with create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection
