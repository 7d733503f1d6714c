"""What jobs over a stream print at their end: accuracies by task, and where to look."""

from functools import partial
from pathlib import Path
from typing import Any

from jobs.terminal import table
from pipeline.learning.session import StreamSession
from pipeline.registry.addresses import ui_command
from pipeline.registry.promotion import champion


def show_tasks(session: StreamSession, summary: dict[str, Any]) -> None:
    """Prints the closing table: accuracy of every task after the last one, and what learning it took."""
    values = summary["accuracy_matrix"]["values"]
    columns = summary["accuracy_matrix"]["columns"]
    rows = []
    for name, metrics in summary["tasks"].items():
        i = columns.index(name)
        when_learned = values[1 + list(summary["tasks"]).index(name)][i]
        accuracies = ("-" if value is None else f"{value:.3f}" for value in (values[0][i], when_learned, values[-1][i]))
        rows.append([name, *accuracies, f"{metrics['seconds']:.0f}"])
    session.progress.show(table("Tasks", ["task", "base", "when learned", "at the end", "seconds"], rows))
    c = summary["continual"]
    parts = [f"{key.replace('_', ' ')} {value:.3f}" for key, value in c.items() if value is not None]
    session.progress.log("   ".join(parts))
    a = summary["answers"]
    session.progress.log(
        f"answers    {a['generated']:,} generated for {a['prompts']:,} prompts, {a['generated'] / a['single_pass']:.2f} of a "
        "single pass (each prompt once by the base, those of tasks once by their expert)"
    )


def print_next_steps(session: StreamSession, report: Path) -> None:
    """Prints where to look."""
    shown = session.output.shown
    session.progress.log(f"\nreport     {shown(report)}")
    session.progress.log(f"summary    {shown(session.folder / 'summary.json')}")
    name = session.pool_model
    now = session.retry(partial(champion, name), "looking for the champion")
    which = f"{name}@champion, version {now.version}" if now else f"{name}, which has no champion yet"
    where = session.config.registry.uri
    output = session.config.output
    browse = f"at {where}" if where else "browse it: pointsman ui" + (f" --output {output}" if output != "runs" else "")
    session.progress.log(f"registry   {which}; {browse}")
    if where is None:
        session.progress.log(f"           (that is: {' '.join(ui_command(session.config.tracking_uri))})")
