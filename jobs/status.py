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
from pipeline.config import is_address, without_secrets
from pipeline.config.learning import output_place
from pipeline.learning.run_status import RunStatus, runs_at, runs_below

if TYPE_CHECKING:
    from cluster.client import Job

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
        runs = [run for place in places for run in _runs_of(place)]
        sweeps = [sweep for run in runs if not is_address(run.folder) for sweep in _sweeps_of(run)]
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


def _runs_of(place: str) -> list[RunStatus]:
    if not is_address(place := output_place(place)):
        return runs_below(Path(place))
    from pipeline.storage.remote import RemoteFolder  # with pyarrow

    return runs_at(RemoteFolder(place))


def _since(run: RunStatus) -> str:
    return (run.updated or "").replace("+00:00", "Z")


def _sweeps_of(run: RunStatus) -> list[SweepStatus]:
    """Returns the sweeps below a run's folder."""
    found = []
    for folder in sorted((Path(run.folder) / "sweeps").glob("*/")):
        summary, trials = folder / "summary.json", None
        if summary.exists():
            try:
                trials = len(json_text.loads(summary.read_text())["trials"])
            except (OSError, ValueError, LookupError, TypeError):  # damaged: that it is there is all that is known
                trials = None
        state = "finished" if summary.exists() else "begun"
        found.append(SweepStatus(run.name, folder.name, state, trials, str(summary if summary.exists() else folder)))
    return found


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
