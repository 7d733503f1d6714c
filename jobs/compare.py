"""Sets the learned pool beside its baselines (`learning.baselines`) in one table.

python -m jobs.compare jobs/configs/demo.yaml
"""

from typing import Annotated

import typer

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import ConfigFile, Overrides, check_output, job_command, load
from jobs.submit_options import Address, SubmittableCommand
from jobs.terminal import Terminal, methods_table
from pipeline.config import ConfigError
from pipeline.learning.state import Stopwatch

MORE = {
    "replay": "sequential fine-tuning that sees 5 % of the earlier tasks' rows again",
    "ewc": "sequential fine-tuning with elastic weight consolidation",
    "multitask_base": "multi-task training on the base prompts too",
}
"""Methods that are compared where they are asked for."""

Also = Annotated[
    list[str] | None,
    typer.Option(
        help="Another method: " + "; ".join(f"{name}, {what}" for name, what in MORE.items()) + ". May be given again."
    ),
]


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[
        int, typer.Option(help="Seeds of fine-tuning without a pool: mean and spread are given.", min=1)
    ] = 1,
    also: Also = None,
    address: Address = None,
) -> None:
    """Compare the learned pool with the base, oracle routing, sequential and multi-task fine-tuning; learns first what is
    missing.
    """
    with user_errors():
        settings = load(config, overrides)
        for name in also or ():
            if name not in MORE:
                raise ConfigError(f"--also {name}: no such method; there are: {', '.join(MORE)}")
        if address:
            more = [word for name in also or () for word in ("--also", name)]
            job_command("jobs.compare", config, overrides, address, "--seeds", str(seeds), *more)
        check_output(settings)
        from jobs.results import print_next_steps, show_tasks
        from pipeline.learning.baselines import FINE_TUNED, compare_methods
        from pipeline.learning.learn import learn_stream, publish
        from pipeline.learning.opening import open_session

        with open_session(settings, job="compare", progress=Terminal()) as session:
            learned = learn_stream(session)
            watch = Stopwatch(session.folder / "state" / "clock-compare.json")
            methods = compare_methods(session, learned, seeds=seeds, fine_tuned=(*FINE_TUNED, *(also or ())))
            summary = learned.summary | {
                "methods": methods,
                "seconds_total": learned.summary["seconds_total"] + watch.stop(),
                "peak_memory_bytes": session.peak_memory(),
            }
            session.log_metrics(
                [
                    (f"{m}/{k}", v[k], 0)
                    for m, v in methods.items()
                    for k in ("new", "base_abilities")
                    if v[k] is not None
                ],
            )
            report = publish(session, summary)
            show_tasks(session, summary)
            session.progress.show(methods_table(methods))
            print_next_steps(session, report)


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
