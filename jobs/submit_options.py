"""Options that every command with --address has: how its job is submitted, which the job itself does not look at."""

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from jobs.lazy import STYLE


@dataclass(frozen=True)
class SubmitOptions:
    """How a job is submitted."""

    env: Sequence[str] = ()
    env_file: Path | None = None
    detach: bool = False
    package_limit: str = "50MiB"
    """The head keeps a package in memory, and every node on its disk."""


_GIVEN: ContextVar[SubmitOptions] = ContextVar("submit options", default=SubmitOptions())  # noqa: B039 - it is frozen


def _options(
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="With --address: a variable that the job gets, from this environment or .env; may be given again. Its value "
            "is shown nowhere. MLFLOW_TRACKING_URI and HF_HOME travel unasked."
        ),
    ] = None,
    env_file: Annotated[
        Path | None, typer.Option(help="With --address: a file of NAME=VALUE lines, all of which the job gets.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With --address: return once the job is submitted.")] = False,
    package_limit: Annotated[
        str, typer.Option(help="With --address: refuse to send more than this.")
    ] = SubmitOptions.package_limit,
) -> None:
    """Options that all commands with --address share."""


def submit_options() -> SubmitOptions:
    """Returns the options of the command that runs."""
    return _GIVEN.get()


def _params(options: Callable[..., None]) -> list[Any]:
    """Returns the options that a function's signature declares."""
    app = typer.Typer(**STYLE)
    app.command()(options)
    return typer.main.get_command(app).params


class SubmittableCommand(TyperCommand):
    """A command with --address: the options for submitting it are the same everywhere, and no job looks at them."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        params = _params(_options)
        self._shared = [param.name for param in params]
        self.params += params

    def invoke(self, ctx: Any) -> Any:
        """Keeps the shared options for `submit_command`, and calls the job with its own."""
        given = {name: ctx.params.pop(name) for name in self._shared}
        options = SubmitOptions(**given | {"env": tuple(given["env"] or ())})
        if options != SubmitOptions() and not ctx.params.get("address"):
            typer.secho("error: --env, --env-file, --detach and --package-limit need --address", fg="red", err=True)
            sys.exit(2)
        before = _GIVEN.set(options)
        try:
            return self.call(ctx)
        finally:
            _GIVEN.reset(before)

    def call(self, ctx: Any) -> Any:
        """Calls the job."""
        return super().invoke(ctx)


Address = Annotated[
    str | None,
    typer.Option(
        help="Submit to the Ray cluster with this dashboard, e.g. http://127.0.0.1:8265, instead of running here."
    ),
]


def _address(address: Address = None) -> None:
    """The option of commands that do not look at it."""


class ComputingCommand(SubmittableCommand):
    """A command without a configuration that can be submitted as it is typed: its paths are those of the head.

    Relative ones lie below ~/pointsman there, so that results last.
    """

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params += _params(_address)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps the words without the options for submitting."""
        ctx.meta["words"] = without_options(
            args, [param for param in self.params if param.name in (*self._shared, "address")]
        )
        return super().parse_args(ctx, args)

    def call(self, ctx: Any) -> Any:
        """Submits the words, or runs them here."""
        address = ctx.params.pop("address")
        if not address:
            return super().call(ctx)
        from jobs.endings import user_errors
        from jobs.submission import submit_words

        with user_errors():
            submit_words(ctx.command_path.split()[1:], ctx.meta["words"], address)


def without_options(words: Sequence[str], options: Sequence[Any]) -> list[str]:
    """Returns a command's words without some options and their values."""
    takes_value = {name: not option.is_flag for option in options for name in option.opts}
    kept, left = [], iter(words)
    for word in left:
        name, separator, _ = word.partition("=")
        if name not in takes_value:
            kept.append(word)
        elif takes_value[name] and not separator:
            next(left, None)
    return kept
