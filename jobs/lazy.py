"""Groups of commands that are imported when they are called: the libraries of all jobs together take seconds to import."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Lazy:
    """A command, or a group of them, and where it is."""

    target: str
    """`module:name` of a function or of a Typer app."""
    summary: str
    """What it does, for the list of commands."""
    look: type[TyperCommand] | None = None
    """Class of the command, where it is not Typer's own."""

    def load(self) -> Any:
        """Imports it; returns the command."""
        module, _, name = self.target.partition(":")
        with importing():
            app = getattr(import_module(module), name)
        if not isinstance(app, typer.Typer):
            app, function = typer.Typer(**STYLE), app
            app.command(cls=self.look)(function)
        return typer.main.get_command(app)


@contextmanager
def importing() -> Iterator[None]:
    """Keeps Python's garbage collector from looking through what is imported, all of which stays: 0.4 of some 3 seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


STYLE: Any = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
"""Plain help, plain tracebacks."""


def run_alone(function: Callable[..., Any], look: type[TyperCommand] | None = None) -> None:
    """Runs one command as a program of its own, `python -m jobs.learn`; its messages are those of `pointsman learn`."""
    app = typer.Typer(**STYLE)
    app.command(cls=look)(function)
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pointsman {version('pointsman')}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
]


def lazy_group(commands: Mapping[str, Lazy], summary: str, *, versioned: bool = False) -> typer.Typer:
    """Returns the app of a group; its list of commands imports none of them."""

    class Group(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            names: Any = dict.fromkeys(commands)  # what Typer looks for similar names in
            self.commands = names

        def get_command(self, ctx: Any, name: str) -> Any:
            return commands[name].load() if name in commands else None

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, command.summary) for name, command in commands.items()])

    app = typer.Typer(cls=Group, help=summary, no_args_is_help=True, **STYLE)

    def callback() -> None:
        """A Typer without commands of its own needs one."""

    def versioned_callback(version: Version = False) -> None:
        """Shows the version where it is asked for."""

    app.callback()(versioned_callback if versioned else callback)
    return app
