"""Sweeps settings of one task's expert and of the pool's router with Ray Tune.

    python -m jobs.sweep jobs/configs/demo.yaml --task later --set expert.rank=4,8,16 --set router.shrinkage=0.02,0.05,0.2

One training per setting of the expert that nobody has trained, one evaluation per setting of the router, inside the pool that
`pointsman learn` has made; the swept expert replaces the task's own there.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import ConfigFile, Overrides, check_output, job_command, load
from jobs.submission import JobFiles
from jobs.submit_options import Address, SubmittableCommand
from pipeline.config import ConfigError, LearnConfig, TaskConfig
from tuning.objective import DEFAULT, Objective
from tuning.search import Search
from tuning.space import Space
from tuning.winner import check_file, write_configuration

if TYPE_CHECKING:  # a mistake is answered before they are imported
    from jobs.terminal import Terminal
    from tuning.study import Study, StudyResult

SPACE = Path(__file__).parent / "configs" / "space.yaml"
"""What is tried unless it is said."""

Task = Annotated[str | None, typer.Option(help="Task of the stream to sweep; default: its last.")]
SpaceFile = Annotated[
    Path | None,
    typer.Option("--space", help="YAML file of a space; default: jobs/configs/space.yaml, which explains it."),
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Field to try and its values; may be repeated: expert.rank=4,8,16, router.temperature=loguniform:0.05:5, "
        "expert.steps=randint:100:400 (below 400); also uniform, lograndint, choice and grid.",
        metavar="FIELD=VALUES",
    ),
]
Algorithm = Annotated[
    str | None,
    typer.Option("--search", help="grid, random, or optuna (TPE). Default: the grid of a space of lists, else random."),
]
Trials = Annotated[int | None, typer.Option(help="Number of points that a random search, or optuna, draws.")]
Scheduler = Annotated[
    str,
    typer.Option(
        help="asha stops trainings early whose accuracy on held-out rows (`validation`) is worse than that of others at the "
        "same validation (expert.validate_every); or none."
    ),
]
ObjectiveText = Annotated[
    str,
    typer.Option(
        "--objective",
        help="Weights of accuracy (on the task), others (the pool's other tasks), abilities (the base's) and cost (millions of "
        "parameters), e.g. accuracy=1,cost=-0.1; or pareto.",
    ),
]
Validation = Annotated[
    float | None, typer.Option(help="Share of the task's training rows to hold out, in place of its `validation`.")
]
Apply = Annotated[
    Path | None, typer.Option(help="File to write the winner to, as a configuration that extends CONFIG.")
]
Register = Annotated[bool, typer.Option("--register", help="Make the winner a candidate version of the task's expert.")]


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    task: Task = None,
    space: SpaceFile = None,
    fields: Fields = None,
    search: Algorithm = None,
    trials: Trials = None,
    scheduler: Scheduler = "none",
    objective: ObjectiveText = DEFAULT,
    validation: Validation = None,
    apply: Apply = None,
    register: Register = False,
    address: Address = None,
) -> None:
    """Sweep settings of a task's expert (rank, alpha, learning rate, steps, ...) and of the router (temperature, ...).

    Trials train an expert where nobody has trained it, and evaluate it inside the learned pool. Winners are chosen by
    --objective, on the task's held-out rows where it has `validation`. Stopped at any moment, the same command goes on.
    """
    with user_errors():
        settings = load(config, overrides)
        goal = Objective.read(objective)
        settings, swept = _swept(settings, task, validation)
        given = Space.read(space or (None if fields else SPACE), fields or []).check(settings, swept)
        plan = Search.read(given, settings, swept, algorithm=search, scheduler=scheduler, trials=trials, objective=goal)
        if address:
            if apply is not None:
                raise ConfigError(
                    "--apply writes a file here, and the sweep runs elsewhere: leave out one of --apply and --address"
                )
            files = JobFiles()
            options: dict[str, Any] = {
                "--task": task,
                "--space": files.text(space, "space") if space else None,
                "--search": search,
            }
            options |= {
                "--trials": trials,
                "--scheduler": scheduler,
                "--objective": objective,
                "--validation": validation,
            }
            more = [word for name, value in options.items() if value is not None for word in (name, str(value))]
            more += [word for field in fields or [] for word in ("--set", field)]
            more += ["--register"] * register
            job_command("jobs.sweep", config, overrides, address, *more, files=files)
        if apply is not None:
            check_file(apply)
        check_output(settings)
        from tuning.study import Study

        found = _run(settings, Study(swept, given, plan, goal), register=register)
        if apply is not None and found.result.best is not None:
            write_configuration(apply, found.result.best, config=config, settings=settings)
            typer.echo(f"winner     {apply}; next: pointsman learn {apply}")
        if found.result.best is None:
            sys.exit(1)


def _swept(settings: LearnConfig, name: str | None, validation: float | None) -> tuple[LearnConfig, TaskConfig]:
    """Returns the configuration and the task to be swept, with the share of its rows to hold out."""
    tasks = {task.name: task for task in settings.stream.tasks}
    if name is not None and name not in tasks:
        raise ConfigError(f"--task {name}: the stream has no such task; there are: {', '.join(tasks)}")
    task = tasks[name or list(tasks)[-1]]
    if validation is None or validation == task.validation:
        return settings, task
    try:
        task = TaskConfig.model_validate(task.model_dump() | {"validation": validation})
    except ValidationError as error:
        raise ConfigError(f"--validation {validation}: {error.errors()[0]['msg']}") from None
    changed = tuple(task if other.name == task.name else other for other in settings.stream.tasks)
    stream = settings.stream.model_copy(update={"tasks": changed})
    return settings.model_copy(update={"stream": stream}), task


def _run(settings: LearnConfig, study: "Study", *, register: bool) -> "StudyResult":
    """Sweeps, and shows what came out."""
    from jobs.terminal import Terminal
    from tuning.study import run

    terminal = Terminal()
    found = run(settings, study, register=register, progress=terminal)
    _show(terminal, settings, found)
    return found


def _show(terminal: "Terminal", settings: LearnConfig, found: "StudyResult") -> None:
    from rich.markup import escape

    from jobs.terminal import table
    from pipeline.learning.output import output_of
    from pipeline.registry.names import pool_name
    from tuning.results import SHOWN, WORDS, shown

    result = found.result
    metrics = [name for name in SHOWN if any(name in trial.metrics for trial in result.done)]
    header = ["", *(name.removeprefix("expert.") for name in found.summary["trials"][0]["values"])]
    rows = []
    for trial in result.trials:
        cells = [shown(value) if name in trial.point else "" for name, value in trial.values.items()]
        if trial.status == "done":
            front = "pareto" if trial.number in found.summary["pareto"] else ""
            row = ["best" if trial is result.best else front, *cells]
            rows.append([*row, *(f"{trial.metrics[name]:.3f}" if name in trial.metrics else "" for name in metrics)])
            continue
        style = "red" if trial.status == "failed" else "dim"
        rows.append(
            [f"[{style}]{text}[/{style}]" for text in (trial.status, *map(escape, cells), *[""] * len(metrics))]
        )
    terminal.show(table(f"Sweep of {found.summary['task']}", [*header, *(WORDS[name] for name in metrics)], rows))
    for trial in result.trials:
        if trial.status == "failed":
            terminal.log(f"failed     {trial.name}: {trial.error}", "red")
    if result.best is None:
        terminal.log("no trial could be evaluated; the same command tries those that failed again", "red")
    one, sweep = result.seconds_one_training, found.summary["sweep"]
    each = "" if one is None else f", {one:.0f} s each"
    terminal.log(
        f"objective  {found.summary['objective']['text']}. {found.summary['selected_on']}\n"
        f"took       {sweep['seconds_total']:.0f} s for {sweep['trials']} trials, {sweep['trainings']} trainings{each}"
    )
    if found.version is not None:
        address = f"{found.version.name}/{found.version.version}"
        pool = pool_name(settings.base.label, settings.pool)
        terminal.log(f"registered {address}, a candidate; next: pointsman registry replace {pool} {address}")
    place = output_of(settings)
    terminal.log(f"report     {place.at(found.report)}\nsummary    {place.at(found.folder / 'summary.json')}")


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
