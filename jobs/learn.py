"""Learns a stream of tasks, one after the other, without forgetting; the job that the project is for.

python -m jobs.learn jobs/configs/demo.yaml expert.rank=32
"""

from typing import TYPE_CHECKING, Any

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import ConfigFile, Overrides, check_output, job_command, load
from jobs.submit_options import Address, SubmittableCommand
from jobs.terminal import Terminal
from pipeline.evaluation.former_summary import by_todays_names
from pipeline.learning.state import read_json

if TYPE_CHECKING:
    from pipeline.learning.session import StreamSession


def main(config: ConfigFile, overrides: Overrides = None, address: Address = None) -> None:
    """Learn a stream of tasks one after the other: experts, pool versions, accuracy matrix, report."""
    with user_errors():
        settings = load(config, overrides)
        if address:
            job_command("jobs.learn", config, overrides, address)
        check_output(settings)
        from jobs.results import print_next_steps, show_tasks
        from pipeline.learning.learn import learn_stream, publish
        from pipeline.learning.opening import open_session

        with open_session(settings, job="learn", progress=Terminal()) as session:
            result = learn_stream(session)
            report = publish(session, _with_comparison(session, result.summary))
            show_tasks(session, result.summary)
            print_next_steps(session, report)


def _with_comparison(session: "StreamSession", summary: dict[str, Any]) -> dict[str, Any]:
    """Keeps the comparison that an earlier `compare` of the same pool has written into the summary."""
    file = session.folder / "summary.json"
    if not file.exists():
        return summary
    before = by_todays_names(read_json(file))
    same = before.get("accuracy_matrix") == summary["accuracy_matrix"] and "methods" in before
    return before if same else summary


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
