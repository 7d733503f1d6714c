"""Sends a job to a Ray cluster, follows it, and turns its end into an exit code.

What `pointsman learn CONFIG --address http://HOST:8265` does: the working folder is uploaded, the same command runs on
the cluster's head. A job dies with its cluster and Ray does not retry it; submitting it again resumes by name.
"""

import asyncio
import logging
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.local import use_token
from pipeline.config import without_secrets
from pipeline.errors import UserError

EXCLUDES = (
    ".git",  # .gitignore is honoured, but does not name .git, and that can be large
    "/runs",
    "mlruns",
    "mlflow.db",
    ".venv",
    "venv",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
)
"""What of the working folder stays here, in .gitignore's notation; without a final slash, or Ray walks through folders."""

POLL_SECONDS = 1.0

ANSWER_SECONDS = 10.0
"""How long the head may take for its first answer; Ray itself would wait for minutes, without a word."""


class SubmitError(UserError):
    """The job could not be handed over or followed; the message names the address and the remedy."""


@dataclass(frozen=True)
class JobOutcome:
    """How a submitted job stands."""

    submission_id: str
    """Ray's name of the job: `ray job logs|stop <submission_id>`."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """What Ray says about the status."""
    exit_code: int
    """For the shell: 0 unless the job failed (its own code, or 1) or was stopped (130)."""


def submit(
    entrypoint: list[str], address: str, working_dir: Path, follow: bool = True, submission_id: str | None = None
) -> JobOutcome:
    """Runs `entrypoint` on the cluster whose dashboard is at `address` (http://host:8265), in a copy of `working_dir`.

    With `follow` its output appears here, and the outcome is the job's end; without, it returns once the job is
    accepted. Raises SubmitError if the head is not reachable, refuses the token or the job.
    """
    client = _client(address)
    address = without_secrets(address)
    try:
        name = client.submit_job(
            entrypoint=shlex.join(entrypoint),
            submission_id=submission_id,
            runtime_env={"working_dir": str(working_dir.resolve()), "excludes": list(EXCLUDES)},
        )
    except (RuntimeError, ValueError) as error:  # Ray's words: name taken, folder too large, ...
        raise SubmitError(f"{address} did not take the job from {working_dir}: {error}") from error
    print(f"submitted {name} to {address}", flush=True)
    if follow:
        try:
            asyncio.run(_print_logs(client, name))
            return _wait(client, name)
        except KeyboardInterrupt:
            print(f"\n{name} goes on; to end it: ray job stop --address {address} {name}", flush=True)
            raise
        except requests.ConnectionError as error:
            raise SubmitError(
                f"lost {address} while {name} was running: {error}\n    follow it again with: "
                f"ray job logs --address {address} --follow {name}"
            ) from error
    return _outcome(client, name)


def _client(address: str) -> JobSubmissionClient:
    """Connects to the head's job server, with the user's token if there is one (it is never printed)."""
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"address {address!r}: jobs go to the dashboard's address, e.g. http://HOST:8265")
    use_token()
    logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)  # packages and websockets are its own affair
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its variables to the argument; the argument must win
    try:
        requests.get(address, timeout=ANSWER_SECONDS)
        return JobSubmissionClient(address)
    except (ConnectionError, requests.RequestException) as error:
        raise SubmitError(
            f"no Ray head answers at {without_secrets(address)}: {without_secrets(str(error))}\n"
            f"    check that it runs and that its dashboard is forwarded here: "
            f"`ray dashboard cluster/ray-cluster.yaml`, or `kubectl port-forward service/NAME-head-svc 8265:8265`"
        ) from error
    except AuthenticationError as error:
        raise SubmitError(
            f"{without_secrets(address)} refuses this user: {str(error).splitlines()[0]}\n    put the cluster's token (there: "
            f"`ray get-auth-token`) into ~/.ray/auth_token here, or name its file in RAY_AUTH_TOKEN_PATH, "
            f"and have RAY_AUTH_MODE=token or unset"
        ) from error


async def _print_logs(client: JobSubmissionClient, name: str) -> None:
    """Prints the job's output as it comes, until it ends."""
    try:
        async for lines in client.tail_job_logs(name):
            print(lines, end="", flush=True)
    except (RuntimeError, aiohttp.ClientError) as error:  # proxies cut quiet connections; the job does not notice
        print(f"\nthe stream of {name}'s output broke ({error}); waiting for its end", flush=True)


def _wait(client: JobSubmissionClient, name: str) -> JobOutcome:
    """Waits for the job's end."""
    while (outcome := _outcome(client, name)).status not in {end.value for end in JobStatus if end.is_terminal()}:
        time.sleep(POLL_SECONDS)
    return outcome


def _outcome(client: JobSubmissionClient, name: str) -> JobOutcome:
    """Asks for the job's state."""
    details = client.get_job_info(name)
    status = details.status.value
    codes = {"FAILED": details.driver_exit_code or 1, "STOPPED": 130}
    return JobOutcome(name, status, details.message or "", codes.get(status, 0))
