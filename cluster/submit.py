"""Hands a job to a Ray cluster, once, and follows it until it ends.

A job is named by the run that it works on. Submitting it while it runs attaches to it; after it has ended, by itself, by a
signal or with its cluster, a new job resumes the run, since Ray neither retries a job nor takes a name twice.
"""

import asyncio
import re
import shlex
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.client import Job, SubmitError, all_jobs, answering, reason_of
from cluster.package import MIB, Package
from pipeline.config import without_secrets

POLL_SECONDS = 0.5

STOP_SECONDS = 30
"""How long a job that is stopped may take to store where it stands; Ray's own 3 s are too few to close MLflow's run."""

ATTEMPTS = 5
"""How often a name is looked for while others submit the same."""

SETTINGS = "settings"
"""Key of a job's metadata: digest of all that was submitted but for the environment."""


@dataclass(frozen=True)
class Submitted:
    """A job that was handed over, or that was there."""

    submission_id: str
    attached: bool
    """Whether it ran before."""
    package_bytes: int
    """Size of what was sent."""


def submit(
    client: JobSubmissionClient,
    address: str,
    *,
    entrypoint: list[str],
    name: str,
    package: Package,
    metadata: Mapping[str, str],
) -> Submitted:
    """Runs `entrypoint` in `package` on the cluster, or finds the job `name` that runs there.

    Raises SubmitError where that one runs with other settings, or where the head does not take the job.
    """
    for _ in range(ATTEMPTS):
        before = _numbered(all_jobs(client, address), name)
        number = max(before, default=0)
        if before and not (running := before[number]).has_ended:
            if running.metadata.get(SETTINGS) != metadata.get(SETTINGS):
                raise SubmitError(
                    f"{running.submission_id} works on this run with other settings; see it with `pointsman jobs attach "
                    f"{running.submission_id}`, end it with `pointsman jobs stop {running.submission_id}`, or give this run "
                    "another `name`"
                )
            return Submitted(running.submission_id, attached=True, package_bytes=0)
        wanted = name if not before else f"{name}-{number + 1}"
        with tempfile.TemporaryDirectory(prefix="pointsman-") as folder:
            archive = Path(folder) / "package.zip"
            size = package.archive(archive)
            try:
                with answering(address):
                    client.submit_job(
                        entrypoint=shlex.join(entrypoint),
                        submission_id=wanted,
                        runtime_env={
                            "working_dir": str(archive),
                            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                        },
                        metadata=dict(metadata),
                    )
            except SubmitError as error:
                if "already exists" in str(error.__cause__):  # somebody was faster
                    continue
                raise SubmitError(f"the job was not taken ({size / MIB:.1f} MiB): {error}") from error
        return Submitted(wanted, attached=False, package_bytes=size)
    raise SubmitError(f"{name}: others submit the same run over and over; try again")


def _numbered(jobs: list[Job], name: str) -> dict[int, Job]:
    """Returns the jobs of a run by their number: `name`, `name-2`, `name-3`."""
    matches = ((re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", job.submission_id), job) for job in jobs)
    return {int(match[1] or 1): job for match, job in matches if match}


def follow(client: JobSubmissionClient, address: str, submission_id: str) -> Job:
    """Prints the job's output from its beginning as it comes; returns the job when it has ended.

    KeyboardInterrupt leaves the job as it is. Raises SubmitError where the head is gone.
    """
    come_back = f"pointsman jobs attach {submission_id} --address {without_secrets(address)}"
    try:
        asyncio.run(_print_output(client, submission_id))
        return _ended(client, address, submission_id)
    except KeyboardInterrupt:
        print(
            f"\ndetached; {submission_id} goes on. Come back: {come_back}   end it: {come_back.replace('attach', 'stop')}"
        )
        raise
    except (requests.ConnectionError, RuntimeError, SubmitError) as error:
        raise SubmitError(
            f"lost {without_secrets(address)} while {submission_id} was running: {reason_of(error)}\n"
            f"    come back with: {come_back}"
        ) from error


async def _print_output(client: JobSubmissionClient, submission_id: str) -> None:
    """Prints the job's output as it comes, until it ends; proxies cut quiet connections, so it goes on where it was."""
    printed, task = 0, asyncio.current_task()
    assert task is not None, "run by asyncio"
    while True:
        seen, whole = 0, False
        try:
            async for text in client.tail_job_logs(submission_id):
                print(text[max(0, printed - seen) :], end="", flush=True)
                seen += len(text)
                printed = max(printed, seen)
            whole = True
        except (RuntimeError, aiohttp.ClientError):
            pass
        if task.cancelling():  # a connection that is closed meanwhile must not hide that the user has interrupted
            raise asyncio.CancelledError
        if whole:
            return
        status: Any = await asyncio.to_thread(client.get_job_status, submission_id)
        if JobStatus(status).is_terminal():
            return
        await asyncio.sleep(POLL_SECONDS)


def _ended(client: JobSubmissionClient, address: str, submission_id: str) -> Job:
    """Waits for the job's end."""
    while not (job := job_now(client, address, submission_id)).has_ended:
        time.sleep(POLL_SECONDS)
    return job


def job_now(client: JobSubmissionClient, address: str, submission_id: str) -> Job:
    """Asks for the job's state."""
    with answering(address):
        return Job.of(client.get_job_info(submission_id))


def stop(client: JobSubmissionClient, address: str, submission_id: str) -> Job:
    """Stops a job and waits until it has ended: what it has finished is kept."""
    with answering(address):
        client.stop_job(submission_id)
    return _ended(client, address, submission_id)
