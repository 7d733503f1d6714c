"""The job server of a Ray head: connecting to it, and what it knows of jobs, as errors and types of this project."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.access import use_token
from pipeline.config import without_secrets
from pipeline.errors import UserError

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's variable for the address of the job server."""

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where `ray start --head` and a forwarded dashboard are."""

ANSWER_SECONDS = 10.0
"""How long the head may take for its first answer; Ray itself would wait for minutes, without a word."""

SIGNALLED = 128
"""What a shell adds to the number of the signal that has ended a process."""


class SubmitError(UserError):
    """The job could not be handed over, followed or found; the message names the address and the remedy."""


@dataclass(frozen=True)
class Job:
    """A submitted job, as the head knows it."""

    submission_id: str
    """Its name: `pointsman jobs logs|stop|attach <submission_id>`."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    started: str | None
    """Time of its submission, in UTC."""
    ended: str | None
    """Time of its end, in UTC."""
    seconds: float | None
    """From its submission to its end, or until now."""
    exit_code: int | None
    """For the shell: 0, the code of the job, or 130 where somebody has stopped it; None while it runs."""
    message: str
    """What Ray says about the status, without the log."""
    entrypoint: str
    """The command on the head."""
    metadata: dict[str, str]
    """What was submitted: command, run, output, version, commit."""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run any more."""
        return self.exit_code is not None

    @classmethod
    def of(cls, details: Any) -> "Job":
        """Returns a job from Ray's details."""
        status: JobStatus = details.status
        started, ended = (_time(details.start_time), _time(details.end_time))
        seconds = ((ended or datetime.now(UTC)) - started).total_seconds() if started else None
        return cls(
            submission_id=details.submission_id,
            status=status.value,
            started=started.isoformat(timespec="seconds") if started else None,
            ended=ended.isoformat(timespec="seconds") if ended else None,
            seconds=seconds,
            exit_code=_exit_code(status, details.driver_exit_code),
            message=(details.message or "").partition(", last available logs")[0],
            entrypoint=details.entrypoint,
            metadata=dict(details.metadata or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all of it."""
        return asdict(self)


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _exit_code(status: JobStatus, code: int | None) -> int | None:
    if not status.is_terminal():
        return None
    if status == JobStatus.FAILED:
        return SIGNALLED - code if code is not None and code < 0 else code or 1
    return 130 if status == JobStatus.STOPPED else 0


def server_address(given: str | None) -> str:
    """Returns the address that is given, else that of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else Ray's default."""
    return given or known_address() or DEFAULT_ADDRESS


def known_address() -> str | None:
    """Returns the address of a job server that the environment names; RAY_ADDRESS can also name a control store."""
    named = (os.environ.get(ADDRESS), os.environ.get("RAY_ADDRESS"))
    return next((address for address in named if address and "://" in address), None)


def connected(address: str) -> JobSubmissionClient:
    """Connects to the head's job server, with the user's token if there is one (it is never printed).

    Raises SubmitError where none answers, or where it refuses the token.
    """
    shown = without_secrets(address)
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"address {shown!r}: jobs go to the dashboard's address, e.g. http://HOST:8265")
    use_token()
    for name in ("dashboard_sdk", "job.sdk"):  # packages and websockets are Ray's own affair
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    os.environ[ADDRESS] = address  # Ray prefers its variables to the argument; the argument must win
    with answering(address):
        requests.get(address, timeout=ANSWER_SECONDS)
        return JobSubmissionClient(address)


@contextmanager
def answering(address: str) -> Iterator[None]:
    """Turns what Ray's client raises where the head is away, refuses or fails into a SubmitError."""
    shown = without_secrets(address)
    try:
        yield
    except AuthenticationError as error:
        raise SubmitError(
            f"{shown} refuses this user: {str(error).splitlines()[0]}\n    put the cluster's token (there: "
            f"`ray get-auth-token`) into ~/.ray/auth_token here, or name its file in RAY_AUTH_TOKEN_PATH, "
            f"and have RAY_AUTH_MODE=token or unset"
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise SubmitError(
            f"no Ray head answers at {shown}: {_why(error)}\n"
            f"    check that it runs and that its dashboard is forwarded here: "
            f"`ray dashboard cluster/ray-cluster.yaml`, or `kubectl port-forward service/NAME-head-svc 8265:8265`"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise SubmitError(f"{shown}: {reason_of(error)}") from error


def _why(error: Exception) -> str:
    """Returns the operating system's words for a connection that failed, which two libraries wrap in theirs."""
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return found[1].lower() if found else without_secrets(str(error))


def reason_of(error: Exception) -> str:
    """Returns the last line with words of an error that may be a traceback of the head's."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return without_secrets(lines[-1].rstrip(".") if lines else type(error).__name__)


def all_jobs(client: JobSubmissionClient, address: str) -> list[Job]:
    """Returns the submitted jobs that the head remembers, the newest first."""
    with answering(address):
        jobs = [Job.of(details) for details in client.list_jobs() if details.submission_id]
    return sorted(jobs, key=lambda job: job.started or "", reverse=True)


def find_job(client: JobSubmissionClient, address: str, name: str) -> Job:
    """Returns the job of that id, else the newest whose id begins so; raises SubmitError where there is none."""
    jobs = all_jobs(client, address)
    exact = (job for job in jobs if job.submission_id == name)
    found = next(exact, None) or next((job for job in jobs if job.submission_id.startswith(name)), None)
    if found is None:
        there = ", ".join(job.submission_id for job in jobs[:5]) or "none"
        raise SubmitError(f"{name!r}: {without_secrets(address)} has no such job; the newest: {there}")
    return found


def last_line(client: JobSubmissionClient, address: str, submission_id: str) -> str:
    """Returns the last line that a job has printed, for those who want to know how far it is."""
    with answering(address):
        lines = [line.strip() for line in client.get_job_logs(submission_id).splitlines() if line.strip()]
    return lines[-1] if lines else ""
