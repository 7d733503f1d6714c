"""`python -m jobs.benchmark`."""

from jobs.benchmark.app import app

app(prog_name="pointsman benchmark")
