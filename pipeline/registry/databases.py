"""Databases that MLflow is pointed at directly: PostgreSQL and MySQL. Whether one answers, and locks that it keeps.

MLflow itself tries a database that it cannot open ten times, for almost two minutes, without saying so: jobs ask first.
"""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from pipeline.locks import PATIENT_SECONDS, POLL_SECONDS

DRIVERS = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "pymysql": "pymysql cryptography",
    "mysqldb": "mysqlclient",
}
"""What to install for each driver, by SQLAlchemy's name."""

MODULES = {"mysqldb": "MySQLdb"}
"""Modules of drivers that are called otherwise."""

CONNECT_SECONDS = 5
"""Seconds that one attempt to reach a database may take."""

_TRY = {
    "postgresql": "SELECT pg_try_advisory_lock(:key)",
    "mysql": "SELECT GET_LOCK(:key, 0)",
}

_logger = logging.getLogger(__name__)


def is_database(uri: str) -> bool:
    """Whether an address is that of PostgreSQL or MySQL, with a driver's name or without."""
    return _dialect(uri) in _TRY


def _dialect(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0]


def database_silence(uri: str) -> str | None:
    """Returns why a database does not let this user in, None if it does; takes CONNECT_SECONDS at most per host."""
    try:
        with _engine(uri).connect():
            return None
    except SQLAlchemyError as error:
        return without_driver(error)


def blurring_collation(uri: str) -> str | None:
    """Returns the collation of a MySQL database that loses characters or takes `a` for `A`; None for one that does neither.

    PostgreSQL does neither.
    """
    if _dialect(uri) != "mysql":
        return None
    with _engine(uri).connect() as connection:
        collation = str(connection.execute(text("SELECT @@collation_database")).scalar())
    return None if re.fullmatch(r"utf8mb4_(\w+_)?(bin|cs)", collation) else collation


def without_driver(error: SQLAlchemyError) -> str:
    """Returns what a database or its driver says, in one line."""
    cause = getattr(error, "orig", None) or error
    said = cause.args[-1] if cause.args and isinstance(cause.args[-1], str) else str(cause)
    return " ".join(said.split())[:300]


@contextmanager
def database_lock(uri: str, name: str, *, on_wait: Callable[[str], None] = _logger.warning) -> Iterator[None]:
    """Holds a lock of the database, which frees it when this process ends; waits for it, after a while with a message.

    Needs a connection to the database itself: behind a pool that hands on connections between transactions it locks nothing.
    """
    digest, database = hashlib.sha256(name.encode()).digest(), make_url(uri).database
    # MySQL's locks are those of the whole server and have names; PostgreSQL's are the database's, and 64-bit numbers.
    key = (
        int.from_bytes(digest[:8], signed=True) if _dialect(uri) == "postgresql" else f"{database}.{digest.hex()}"[:64]
    )
    began, reported = time.monotonic(), False
    with _engine(uri).connect() as connection:
        while not connection.execute(text(_TRY[_dialect(uri)]), {"key": key}).scalar():
            if not reported and time.monotonic() - began > PATIENT_SECONDS:
                on_wait(f"waiting for another process, which holds lock {name!r} of the registry's database")
                reported = True
            time.sleep(POLL_SECONDS)
        yield


def _engine(uri: str) -> Engine:
    return create_engine(
        uri, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": CONNECT_SECONDS}
    )
