"""Shows what is going on: runs of an output folder, their sweeps, and jobs of a cluster; running and past, and where to look.

python -m jobs.status --output runs --address http://127.0.0.1:8265
"""

import json as json_text
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.submissions.listing import jobs_table
from jobs.terminal import Terminal, table
from pipeline.config import ConfigError, is_address, output_place, without_secrets
from pipeline.learning.run_status import SUMMARY, RunStatus, runs_at, runs_below

if TYPE_CHECKING:
    from cluster.client import Job
    from pipeline.storage.remote import RemoteFolder

SWEEPS = "sweeps"
"""Folder of a run's sweeps, below its own."""

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

Output = Annotated[
    list[str] | None,
    typer.Option(
        help="Folder of runs, or an address (s3://); may be given again. Default: runs, and ~/pointsman/runs of submitted jobs."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Dashboard of a Ray cluster whose jobs are shown too; default: $RAY_API_SERVER_ADDRESS, or none."
    ),
]


@dataclass(frozen=True)
class SweepStatus:
    """A sweep of a run's task."""

    run: str
    name: str
    state: str
    """finished, or begun: the run's own state says whether it works."""
    trials: int | None
    """Trials in its summary."""
    where: str


def main(
    output: Output = None,
    address: Address = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show runs, sweeps and submitted jobs, running and past, with their progress and where to look."""
    with user_errors():
        places = output or ["runs", str(Path.home() / "pointsman" / "runs")]
        runs, sweeps = list[RunStatus](), list[SweepStatus]()
        for place in places:
            its_runs, its_sweeps = _found_at(place)
            runs += its_runs
            sweeps += its_sweeps
        address, jobs, progress = _jobs(address)
        if json:
            found: dict[str, Any] = {
                "runs": [run.to_json() for run in runs],
                "sweeps": [asdict(sweep) for sweep in sweeps],
                "jobs": None,
            }
            if jobs is not None:
                found["jobs"] = [j.to_json() | {"progress": progress.get(j.submission_id, "")} for j in jobs]
            typer.echo(json_text.dumps(found, indent=2))
            return
        terminal = Terminal()
        if runs:
            rows = [[r.name, r.job, r.state, _since(r), r.progress, r.where] for r in runs]
            terminal.show(
                table("Runs", ["run", "job", "state", "last sign of life", "progress", "where"], rows, text=True)
            )
        else:
            terminal.log(f"no runs in {', '.join(map(without_secrets, places))}")
        if sweeps:
            rows = [[f"{s.run}/{s.name}", s.state, "" if s.trials is None else str(s.trials), s.where] for s in sweeps]
            terminal.show(table("Sweeps", ["sweep", "state", "trials", "where"], rows, text=True))
        if jobs is not None:
            terminal.show(jobs_table(jobs, address or "", progress))


def _found_at(place: str) -> tuple[list[RunStatus], list[SweepStatus]]:
    """Returns the runs in a folder or at an address, and their sweeps."""
    try:
        place = output_place(place)
    except ValueError as error:
        raise ConfigError(f"--output {without_secrets(place)}: {error}") from None
    if not is_address(place):
        runs = runs_below(Path(place))
        return runs, [sweep for run in runs for sweep in _sweeps_below(run.name, Path(run.folder) / SWEEPS)]
    from pipeline.storage.remote import RemoteFolder  # with pyarrow

    output = RemoteFolder(place)
    runs = runs_at(output)
    return runs, [sweep for run in runs for sweep in _sweeps_at(run.name, output / run.name / SWEEPS)]


def _since(run: RunStatus) -> str:
    return (run.updated or "").replace("+00:00", "Z")


def _sweeps_below(run: str, sweeps: Path) -> list[SweepStatus]:
    found = []
    for folder in sorted(sweeps.glob("*/")):
        try:
            summary = (folder / SUMMARY).read_bytes()
        except OSError:  # not finished
            summary = None
        found.append(_sweep(run, folder.name, folder, summary))
    return found


def _sweeps_at(run: str, sweeps: "RemoteFolder") -> list[SweepStatus]:
    folders = {name: sweeps / name for name in sweeps.folders()}
    return [_sweep(run, name, folder, folder.read(SUMMARY)) for name, folder in folders.items()]


def _sweep(run: str, name: str, folder: "Path | RemoteFolder", summary: bytes | None) -> SweepStatus:
    if summary is None:
        return SweepStatus(run, name, "begun", None, str(folder))
    try:
        trials = len(json_text.loads(summary)["trials"])
    except (ValueError, LookupError, TypeError):  # damaged: that it is there is all that is known
        trials = None
    return SweepStatus(run, name, "finished", trials, str(folder / SUMMARY))


def _jobs(address: str | None) -> "tuple[str | None, list[Job] | None, dict[str, str]]":
    """Returns the jobs of a cluster, its address, and the last line of those that run; None where no cluster is known."""
    address = address or next((a for name in ADDRESS_VARIABLES if "://" in (a := os.environ.get(name, ""))), None)
    if address is None:
        return None, None, {}
    from cluster.client import all_jobs, connected, last_line  # with Ray

    client = connected(address)
    jobs = all_jobs(client, address)
    running = [job.submission_id for job in jobs if not job.has_ended]
    return address, jobs, {name: last_line(client, address, name) for name in running}


if __name__ == "__main__":
    run_alone(main)
