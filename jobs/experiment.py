"""Does experiments on the demo's base that show what the method does and where it ends, and writes their pages.

python -m jobs.experiment forgetting --seeds 3
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.endings import user_errors
from jobs.experiments.catalogue import CATALOGUE
from jobs.lazy import run_alone
from jobs.submit_options import ComputingCommand
from jobs.terminal import Terminal, table
from pipeline.config import ConfigError

ALL = "all"
"""Name for all experiments."""

Name = Annotated[str, typer.Argument(help=f"One of {', '.join(CATALOGUE)}; or {ALL}.", metavar="NAME")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Fields of all runs' configurations to change, e.g. expert.steps=20 evaluation.limit=10 to look at it quickly; "
        "the page says so.",
        metavar="[FIELD=VALUE]...",
    ),
]
Seeds = Annotated[int, typer.Option(help="Seeds, from 0 on: mean and deviation are given.", min=1)]
Output = Annotated[Path, typer.Option(help="Folder of all results; experiments are done in `experiments` in it.")]
Again = Annotated[
    bool, typer.Option("--again", help="Measure anew what was measured before; what was trained is still found.")
]


def main(
    name: Name, overrides: Overrides = None, seeds: Seeds = 3, output: Output = Path("runs"), again: Again = False
) -> None:
    """Do an experiment, or all: tables, figures, a page, RESULTS.md, summary.json. Stopped, the same command goes on."""
    with user_errors():
        if name not in (*CATALOGUE, ALL):
            raise ConfigError(f"{name}: no such experiment; there are: {', '.join(CATALOGUE)}, and {ALL}")
        from jobs.experiments.settings import Settings

        settings = Settings(output / "experiments", tuple(overrides or ()))
        terminal = Terminal()
        for each in CATALOGUE if name == ALL else (name,):
            _experiment(each, settings, range(seeds), terminal, again=again)
        terminal.log(f"results    {settings.folder / 'RESULTS.md'}")
        terminal.log(f"summary    {settings.folder / 'summary.json'}")


def _experiment(name: str, settings: Any, seeds: Sequence[int], terminal: Terminal, *, again: bool) -> None:
    """Does one experiment; writes its part of the summary and the pages."""
    from jobs.experiments.page import HOW, SUMMARY, write_page, write_results
    from jobs.experiments.running import results_of
    from pipeline.files import write_json
    from pipeline.learning.state import read_json
    from pipeline.provenance import now, provenance

    started, experiment, folder = now(), CATALOGUE[name].load(name), settings.folder / name
    runs = [run for seed in seeds for run in experiment.runs(seed, settings.configure)]
    results = results_of(name, experiment, runs, folder, terminal, again=again)
    how = {
        **provenance(name, started),
        "seeds": list(seeds),
        "runs": len(runs),
        "seconds": sum(result["seconds"] for each in results.values() for result in each),
        "overrides": list(settings.overrides),
    }
    file = settings.folder / SUMMARY
    summary = (read_json(file) if file.exists() else {}) | {name: experiment.summarise(results) | {HOW: how}}
    write_json(file, summary)
    page = write_page(name, experiment, summary[name], folder)
    done = {each: entry.load(each) for each, entry in CATALOGUE.items() if each in summary}
    write_results(summary, done, settings.folder)
    for drawn in experiment.tables(summary[name]):
        terminal.show(table(drawn.title, drawn.header, drawn.rows))
    terminal.log(f"page       {page}")


if __name__ == "__main__":
    run_alone(main, ComputingCommand)
