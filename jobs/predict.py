"""Answers rows in bulk with a pool: files in, files of answers out.

python -m jobs.predict rows.parquet answers --pool models:/tiny.pool.demo@champion source.columns.question=query
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import lasting
from jobs.registry.options import RegistryUri, registry_address
from jobs.submission import JobFiles, submit_command
from jobs.submit_options import Address, SubmittableCommand
from jobs.terminal import Terminal
from pipeline.config import ConfigError, PredictConfig, is_address, load_config, without_secrets

Rows = Annotated[
    str, typer.Argument(help="File, folder, glob or URI of parquet, jsonl, json, tsv or csv.", metavar="ROWS")
]
Out = Annotated[str, typer.Argument(help="Folder for the answers; the same command goes on there.", metavar="OUT")]
PoolAddress = Annotated[
    str,
    typer.Option("--pool", help="A pool's folder or address, as runs/demo/pool, or models:/tiny.pool.demo@champion."),
]
Told = Annotated[
    str | None,
    typer.Option(help="Oracle routing: an expert that answers everything, or the column that names each row's."),
]
Fields = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings, e.g. source.columns.question=query evaluation.workers=4.", metavar="[FIELD=VALUE]..."
    ),
]


def main(
    rows: Rows,
    out: Out,
    pool: PoolAddress,
    fields: Fields = None,
    told: Told = None,
    registry_uri: RegistryUri = None,
    address: Address = None,
) -> None:
    """Answer every row of files with a pool: each with answer, expert and posterior, in parquet files.

    Rows that cannot be answered are set aside in OUT/quarantine with the reason, and counted: rows in are rows out and rows
    set aside. Stopped at any moment, the same command goes on after the last file.
    """
    with user_errors():
        settings = {"source.path": rows, "told": told}
        words = [
            f"{name}={json.dumps(value)}" for name, value in settings.items() if value is not None
        ]  # not YAML's to read
        words += fields or []
        config = load_config(None, words, PredictConfig)
        registry = registry_address(registry_uri)
        if is_address(out):
            raise ConfigError("OUT: answers go to a folder, not to an address; copy it there when it is complete")
        if address:
            options = {"--pool": pool, "--registry": registry_uri, "--told": told}
            more = [word for name, value in options.items() if value is not None for word in (name, value)]
            files = JobFiles()
            fields_there = [files.override(field, PredictConfig) for field in fields or []]
            words = [files.path(rows), out, *fields_there, *more]
            submit_command(
                ["predict", *words],
                ["predict", rows, out, *(fields or []), *more],
                address,
                files,
                run=Path(out).name,
                output=out,
            )
        from cluster.local import connect
        from pipeline.data.sources.reader import count_rows
        from pipeline.prediction.identity import DEMO
        from pipeline.prediction.pool_source import pool_source
        from pipeline.prediction.predict import predict
        from pipeline.registry.versions import MODELS

        terminal, folder = Terminal(), Path(lasting(out)).expanduser().resolve()
        with terminal.working("looking the pool up"):
            source = pool_source(pool if pool.startswith(MODELS) else lasting(pool), registry, config.base)
        with terminal.working("starting Ray"):
            connect()
        total = count_rows(config.source, folder / DEMO)
        try:
            with terminal.rows("answering rows", total) as bar:
                summary = predict(config, source, folder, bar)
        except KeyboardInterrupt:
            terminal.log("stopped; what is written is kept, and the same command goes on from there")
            raise
        terminal.log(
            f"{summary['rows_in']:,} rows in, {summary['rows_out']:,} answered, {summary['set_aside']:,} set aside in "
            f"{summary['seconds']:.0f} s"
            + (f" ({summary['rows_per_second']:.1f} rows/s)" if summary["rows_per_second"] else "")
        )
        terminal.log("experts    " + ", ".join(f"{name} {count:,}" for name, count in summary["by_expert"].items()))
        terminal.log(f"pool       {without_secrets(source.address)}, digest {source.digest}")
        terminal.log(f"answers    {folder}")


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
