"""Measures what the project adds to the work itself, as ratios within one run.

python -m jobs.benchmark training jobs/configs/embedded.yaml    a stage of training against a plain loop
python -m jobs.benchmark plan                                   planned memory against measured
python -m jobs.benchmark routers jobs/configs/embedded.yaml     how well routers choose, among fifty experts too
python -m jobs.benchmark routing                                routers against PEFT's ways to have several experts
python -m jobs.benchmark data                                   preprocessing against datasets.map, memory, bad rows
python -m jobs.benchmark families                               every family of bases, learned, registered, reloaded
python -m jobs.benchmark text                                   two tasks on pretrained weights, and what was kept
"""

import typer

from jobs.benchmark.data import data
from jobs.benchmark.families import families
from jobs.benchmark.plan import plan
from jobs.benchmark.routers import routers
from jobs.benchmark.routing import routing
from jobs.benchmark.text import text
from jobs.benchmark.training import training

app = typer.Typer(help="Measure what the project adds to the work itself.", no_args_is_help=True, rich_markup_mode=None)

for measure in (training, plan, routing, routers, data, families, text):
    app.command(measure.__name__)(measure)


@app.callback()
def benchmarks() -> None:
    """Measure what the project adds to the work itself."""
