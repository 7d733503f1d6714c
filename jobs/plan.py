"""Says what learning a stream will take before any GPU is rented: parameters, memory, operations, hours, disk.

    python -m jobs.plan jobs/configs/internvl2_2b.yaml --gpu a10g --base-config jobs/configs/bases/internvl2_2b

Reads the stream's configuration and the base's config.json; no weights, no data, no GPU.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import ConfigFile, Overrides, load
from jobs.terminal import Terminal
from pipeline.config import ConfigError
from pipeline.files import write_json
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.gpus import GPUS
from pipeline.provenance import now, provenance

Gpu = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join(GPUS)}.",
        show_default="the smallest that holds the job; this machine's memory without training.gpu",
    ),
]
BaseConfig = Annotated[
    Path | None,
    typer.Option(help="The base's config.json, or its folder, where base.path is not on this machine.", metavar="FILE"),
]
Output = Annotated[Path | None, typer.Option(help="Folder of plan.json.", show_default="runs/<name>")]


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Gpu = None,
    base_config: BaseConfig = None,
    tiles: Annotated[int, typer.Option(help="Tiles of a typical row, thumbnail included.", min=0)] = Assumptions.tiles,
    text_tokens: Annotated[
        int, typer.Option(help="Text tokens of a typical row, template and answer included.", min=1)
    ] = Assumptions.text_tokens,
    answer_tokens: Annotated[
        int, typer.Option(help="Learned tokens of a typical row: its answer's.", min=1)
    ] = Assumptions.answer_tokens,
    longest_answer: Annotated[
        int, typer.Option(help="Learned tokens of the longest row, or --answer-tokens if that is more.", min=1)
    ] = Assumptions.longest_answer,
    utilisation: Annotated[
        float, typer.Option(help="Share of the GPU's operations that training reaches.", min=0.01, max=1)
    ] = Assumptions.utilisation,
    link: Annotated[
        float | None,
        typer.Option(
            help="GB/s between workers, one way, where they are not in one machine: 3 for 25 Gbit/s.",
            show_default="NVLink or PCIe by --gpu",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print all formulas with their sources.")] = False,
    output: Output = None,
) -> None:
    """Plan a stream before any GPU is rented: memory by part, what to change if it does not fit, hours, disk."""
    started = now()
    with user_errors():
        settings = load(config, overrides)
        if answer_tokens > text_tokens:
            raise ConfigError(
                f"--answer-tokens {answer_tokens}: --text-tokens {text_tokens} includes them; raise it, too"
            )

        from jobs.plan_tables import show
        from pipeline.planning.advice import advice
        from pipeline.planning.architecture import architecture_of, base_configuration
        from pipeline.planning.summary import check_gpu, formulas, make_plan, smallest_gpu, summary

        check_gpu(gpu)
        architecture = architecture_of(
            base_configuration(settings.base, _config_json(base_config)), settings.expert.target_modules
        )
        assumptions = Assumptions(tiles, text_tokens, answer_tokens, longest_answer, utilisation)
        planned = gpu or smallest_gpu(settings, architecture, assumptions)
        plan = make_plan(settings, architecture, gpu=planned, assumptions=assumptions, link=link)
        changes = advice(plan)
        values = summary(plan, planned, changes)
        values = {
            **provenance(settings.name, started, seed=settings.seed),
            **values,
        }
        file = (output or Path("runs") / settings.name) / "plan.json"
        write_json(file, values)
    if as_json:
        typer.echo(json.dumps(values, indent=1))
        return
    terminal = Terminal()
    show(terminal, plan, planned, changes)
    if planned and not gpu:
        terminal.log(
            f"no --gpu was given: {planned} has the least memory of those that hold the job, or the most of all"
        )
    if explain:
        typer.echo(formulas())
    terminal.log(f"summary    {file}")


def _config_json(given: Path | None) -> Path | None:
    return given / "config.json" if given is not None and given.is_dir() else given


if __name__ == "__main__":
    run_alone(main)
