"""Recomputes what routers know of each task's prompts, without training: the experts stay, a new pool stands beside the old.

    python -m jobs.recompute_statistics jobs/configs/demo.yaml --pool models:/tiny.pool.demo/3

For a pool that an older release wrote (this one refuses to route by it), or for other settings of CONFIG's `router`:
feature_width, statistics_rows, quantile, shrinkage, null_components. Stopped at any moment, the same command goes on.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import ConfigFile, Overrides, check_output, job_command, load
from jobs.submit_options import Address, SubmittableCommand
from jobs.terminal import Terminal
from pipeline.config import ConfigError, is_address, without_secrets

PoolAddress = Annotated[
    str | None,
    typer.Option(
        "--pool",
        help="The pool: a folder, or models:/<base>.pool/<version>, or models:/<base>.pool@<alias>. Default: the run's own, "
        "<output>/<name>/pool, else the registry's champion.",
    ),
]
SkipMissing = Annotated[
    bool,
    typer.Option(
        "--skip-missing",
        help="Leave experts out of the new pool whose task's rows are gone, instead of ending at once.",
    ),
]


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    pool: PoolAddress = None,
    skip_missing: SkipMissing = False,
    address: Address = None,
) -> None:
    """Recompute a pool's statistics, without training: for a pool of an older release, or for other router settings.

    CONFIG is the stream's own file: its tasks are found by the experts' names, their training rows are read again, at most
    router.statistics_rows of each, and its base prompts. LoRA and routing vectors stay as they are. Experts and pool
    become new versions in the registry; the old ones stay. Nothing is changed before all rows are found; stopped at any moment,
    the same command goes on. `pointsman learn` with the same CONFIG goes on from the recomputed experts, evaluates the new pool
    and lets the gate decide whether it becomes `champion`.
    """
    with user_errors():
        settings = load(config, overrides)
        if pool is not None and is_address(pool):
            raise ConfigError(
                f"--pool {without_secrets(pool)}: name the run's own pool by leaving --pool out, a registered one as "
                "models:/<base>.pool.<name>/<version>, or copy this one into a folder"
            )
        if address:
            options = [*(["--pool", pool] if pool else []), *(["--skip-missing"] if skip_missing else [])]
            job_command("jobs.recompute_statistics", config, overrides, address, *options)
        check_output(settings)
        from pipeline.learning.opening import open_session
        from pipeline.learning.recomputing import pool_to_renew, recompute

        with (
            open_session(settings, job="recompute-statistics", progress=Terminal(), trains=False) as session,
            tempfile.TemporaryDirectory(dir=session.folder, prefix="pool-") as scratch,
        ):
            recompute(session, pool_to_renew(session, pool, Path(scratch)), skip_missing=skip_missing)


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
