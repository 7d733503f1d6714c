"""The console command `pointsman`: every job is a subcommand; `--address` submits the same job to a cluster."""

from typing import Any

import typer
from typer.core import TyperCommand

from jobs import compare, convert_internvl2, explain, learn, plan, pretrain_tiny, sweep, ui
from jobs.benchmark.app import app as benchmarks
from jobs.options import fields_help

app = typer.Typer(
    help="Continual learning for vision-language models: one expert a task, a router between them, nothing forgotten.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class TeachingCommand(TyperCommand):
    """A command whose help ends with every field of its configuration."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the fields as they stand, one to a paragraph."""
        formatter.write("\n" + fields_help() + "\n")


app.command("learn", cls=TeachingCommand)(learn.main)
app.command("compare", cls=TeachingCommand)(compare.main)
app.command("sweep", cls=TeachingCommand)(sweep.main)
app.command("plan", cls=TeachingCommand)(plan.main)
app.command("explain")(explain.main)
app.command("ui")(ui.main)
app.command("pretrain-tiny")(pretrain_tiny.main)
app.command("convert-internvl2")(convert_internvl2.main)
app.add_typer(benchmarks, name="benchmark")

if __name__ == "__main__":
    app()
