"""What jobs over a stream print at their end: accuracies by task, and where to look."""

from pathlib import Path
from typing import Any

from jobs.terminal import table
from pipeline.learning.session import StreamSession
from pipeline.registry.pools import pool_name
from pipeline.registry.tracking import ui_command


def show_tasks(run: StreamSession, summary: dict[str, Any]) -> None:
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


def print_next_steps(run: StreamSession, report: Path) -> None:
    """Prints where to look."""
    run.progress.say(f"\nreport     {report}")
    run.progress.say(f"summary    {run.folder / 'summary.json'}")
    if run.config.registry.uri is None:
        run.progress.say(f"registry   {pool_name(run.config.base.label)}@champion; browse it: pointsman ui")
        run.progress.say(f"           (that is: {' '.join(ui_command(run.config.tracking_uri))})")
    else:
        run.progress.say(f"registry   {pool_name(run.config.base.label)}@champion at {run.config.registry.uri}")
