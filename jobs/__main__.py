"""The console command where it is not installed, and what a submitted job runs: `python -m jobs learn demo.yaml`."""

import os
import sys

from cluster.environment import apply
from cluster.submitted import metadata
from jobs.cli import app
from jobs.submission import AT_HOME, HOME
from pipeline.provenance import COMMAND

if __name__ == "__main__":
    sys.argv[0] = "pointsman"  # as summaries name the command
    apply()
    if typed := metadata().get("command"):
        os.environ.setdefault(COMMAND, typed)
    if sys.argv[1:2] == [AT_HOME]:
        del sys.argv[1]
        HOME.expanduser().mkdir(exist_ok=True)
        os.chdir(HOME.expanduser())
    app(prog_name="pointsman")
