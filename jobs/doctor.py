"""Says before a job whether all is there that it needs: Ray, room, equal nodes, base, storage, registry.

python -m jobs.doctor jobs/configs/demo.yaml
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import Overrides, job_command, load
from jobs.submission import JobFiles, submit_command
from jobs.submit_options import Address, SubmittableCommand

if TYPE_CHECKING:
    from cluster.survey import Finding

MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("FAILED", "red")}
"""How the outcome of a check is shown, and its colour."""

ConfigFile = Annotated[
    Path | None,
    typer.Argument(help="YAML file of a stream; without one the cluster alone is looked at.", metavar="[CONFIG]"),
]


def main(
    config: ConfigFile = None,
    overrides: Overrides = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON instead of lines.")] = False,
) -> None:
    """Check what a job needs before it starts: one line per check, with what to do; exit code 2 if one has failed.

    Ray and its nodes, room for the configuration's workers, equal versions, the base and the output folder on every node, the
    registry. `pointsman learn` checks the same, and is silent unless something fails.
    """
    with user_errors():
        more = ["--json"] if as_json else []
        settings = None if config is None else load(config, overrides)
        if address and config is not None:
            job_command("jobs.doctor", config, overrides, address, *more)
        elif address:
            submit_command(["doctor", *more], ["doctor", *more], address, JobFiles(), run="cluster", output="")
        from cluster.local import ClusterError, connect
        from pipeline.learning.checkup import all_findings, failed_finding

        def look() -> "Iterator[Finding]":
            try:
                cluster = connect()
            except ClusterError as error:
                yield failed_finding("ray", error)
                return
            yield from all_findings(settings, cluster)

        findings = []
        for finding in look():
            findings.append(finding)
            if not as_json:
                mark, colour = MARKS[finding.status]
                typer.secho(f"{mark:8}", fg=colour, nl=False)
                typer.echo(
                    f"{finding.name:10}{finding.text}" + (f"\n{'':18}{finding.remedy}" if finding.remedy else "")
                )
        if as_json:
            typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
        if any(finding.status == "failed" for finding in findings):
            sys.exit(2)


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
