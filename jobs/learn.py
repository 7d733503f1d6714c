"""Learns a stream of tasks, one after the other, without forgetting; the job that the project is for.

python -m jobs.learn jobs/configs/demo.yaml expert.rank=16
"""

from typing import Any

from jobs.options import Address, ConfigFile, Overrides, job_command, load, user_errors
from jobs.results import print_next_steps, show_tasks
from jobs.terminal import Terminal
from pipeline.learning.learn import learn_stream, publish
from pipeline.learning.opening import open_run
from pipeline.learning.session import StreamSession
from pipeline.learning.state import read_json


def main(config: ConfigFile, overrides: Overrides = None, address: Address = None) -> None:
    """Learn a stream of tasks one after the other: experts, pool versions, accuracy matrix, report."""
    with user_errors():
        settings = load(config, overrides)
        if address:
            job_command("jobs.learn", config, overrides, address)
        with open_run(settings, job="learn", progress=Terminal()) as run:
            result = learn_stream(run)
            report = publish(run, _with_comparison(run, result.summary))
            show_tasks(run, result.summary)
            print_next_steps(run, report)


def _with_comparison(run: StreamSession, summary: dict[str, Any]) -> dict[str, Any]:
    """Keeps the comparison that an earlier `compare` of the same pool has written into the summary."""
    file = run.folder / "summary.json"
    if not file.exists():
        return summary
    before = read_json(file)
    same = before.get("accuracy_matrix") == summary["accuracy_matrix"] and "methods" in before
    return before if same else summary


if __name__ == "__main__":
    import typer

    typer.run(main)
