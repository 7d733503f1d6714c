"""Learns a stream of tasks, one after the other, without forgetting; the job that the project is for.

python -m jobs.learn jobs/configs/embedded.yaml expert.rank=16
"""

from pathlib import Path
from typing import Any

from jobs.options import Address, ConfigFile, Overrides, job_command, load, user_errors
from jobs.terminal import Terminal, table
from pipeline.learning.learn import learn_stream, publish
from pipeline.learning.opening import open_run
from pipeline.learning.session import StreamSession
from pipeline.learning.state import read_json
from pipeline.registry.pools import pool_name
from pipeline.registry.tracking import ui_command


def main(config: ConfigFile, overrides: Overrides = None, address: Address = None) -> None:
    """Learn a stream of tasks one after the other: experts, pool versions, accuracy matrix, report."""
    with user_errors():
        settings = load(config, overrides)
        if address:
            job_command("jobs.learn", config, overrides, address)
        with open_run(settings, job="learn", progress=Terminal()) as run:
            result = learn_stream(run)
            report = publish(run, _with_comparison(run, result.summary))
            show(run, result.summary)
            where_next(run, report)


def _with_comparison(run: StreamSession, summary: dict[str, Any]) -> dict[str, Any]:
    """Keeps the comparison that an earlier `compare` of the same pool has written into the summary."""
    file = run.folder / "summary.json"
    if not file.exists():
        return summary
    before = read_json(file)
    same = before.get("accuracy_matrix") == summary["accuracy_matrix"] and "methods" in before
    return before if same else summary


def show(run: StreamSession, summary: dict[str, Any]) -> None:
    """Prints the closing table: accuracy of every task after the last one, and what learning it took."""
    values = summary["accuracy_matrix"]["values"]
    columns = summary["accuracy_matrix"]["columns"]
    rows = []
    for name, figures in summary["tasks"].items():
        i = columns.index(name)
        own = values[1 + list(summary["tasks"]).index(name)][i]
        accuracies = ("-" if value is None else f"{value:.3f}" for value in (values[0][i], own, values[-1][i]))
        rows.append([name, *accuracies, f"{figures['seconds']:.0f}"])
    run.progress.show(table("Tasks", ["task", "base", "when learned", "at the end", "seconds"], rows))
    c = summary["continual"]
    parts = [f"{key.replace('_', ' ')} {value:.3f}" for key, value in c.items() if value is not None]
    run.progress.say("   ".join(parts))
    a = summary["answers"]
    run.progress.say(
        f"answers    {a['generated']:,} generated for {a['prompts']:,} prompts, {a['generated'] / a['single_pass']:.2f} of a "
        "single pass (each prompt once by the base, those of tasks once by their expert)"
    )


def where_next(run: StreamSession, report: Path) -> None:
    """Prints where to look."""
    run.progress.say(f"\nreport     {report}")
    run.progress.say(f"summary    {run.folder / 'summary.json'}")
    if run.config.registry.uri is None:
        run.progress.say(f"registry   {pool_name(run.config.base.label)}@champion; browse it: pointsman ui")
        run.progress.say(f"           (that is: {' '.join(ui_command(run.config.tracking_uri))})")
    else:
        run.progress.say(f"registry   {pool_name(run.config.base.label)}@champion at {run.config.registry.uri}")


if __name__ == "__main__":
    import typer

    typer.run(main)
