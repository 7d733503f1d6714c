"""What one can do with jobs that were submitted."""

import json as json_text
import sys
from typing import Annotated

import typer

from jobs.endings import user_errors
from jobs.submissions.listing import jobs_table
from jobs.terminal import Terminal

Address = Annotated[
    str | None,
    typer.Option(help="Dashboard of the Ray cluster; default: $RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265."),
]
Name = Annotated[
    str, typer.Argument(help="Id of a job, or how it begins (learn-demo): the newest of those.", metavar="JOB")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def list_jobs(address: Address = None, json: Json = False) -> None:
    """List the jobs that a Ray cluster remembers, the newest first."""
    with user_errors():
        from cluster.client import all_jobs, connected, server_address

        address = server_address(address)
        jobs = all_jobs(connected(address), address)
        if json:
            typer.echo(json_text.dumps([job.to_json() for job in jobs], indent=2))
            return
        Terminal().show(jobs_table(jobs, address))


def logs(name: Name, address: Address = None) -> None:
    """Print the output of a job so far."""
    with user_errors():
        from cluster.client import answering, connected, find_job, server_address

        address = server_address(address)
        client = connected(address)
        job = find_job(client, address, name)
        with answering(address):
            typer.echo(client.get_job_logs(job.submission_id), nl=False)


def attach(name: Name, address: Address = None) -> None:
    """Follow a job: its output from the beginning until it ends, and its exit code. Ctrl-C leaves it running."""
    with user_errors():
        from cluster.client import connected, find_job, server_address
        from cluster.submit import follow

        address = server_address(address)
        client = connected(address)
        sys.exit(follow(client, address, find_job(client, address, name).submission_id).exit_code)


def stop(name: Name, address: Address = None) -> None:
    """Stop a job and wait for its end. What it has finished is kept: the same command submitted again goes on from there."""
    with user_errors():
        from cluster.client import connected, find_job, server_address
        from cluster.submit import stop as stop_job

        address = server_address(address)
        client = connected(address)
        job = find_job(client, address, name)
        if job.has_ended:
            typer.echo(f"{job.submission_id} had ended before: {job.status}")
            return
        with Terminal().working(f"stopping {job.submission_id}"):
            job = stop_job(client, address, job.submission_id)
        typer.echo(f"{job.submission_id} {job.status}; submitted again, the run goes on from there")
