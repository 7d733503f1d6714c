"""The console command: quick to say what there is, and every part of it can be called."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from jobs.benchmark.app import BENCHMARKS
from jobs.cli import JOBS, app
from jobs.registry.app import COMMANDS
from jobs.submissions.app import COMMANDS as JOB_COMMANDS

LIST = """
import sys
from typer.testing import CliRunner
from jobs.cli import app
for words in ([], ["benchmark"]):
    print(CliRunner().invoke(app, [*words, "--help"]).output)
assert not {"torch", "ray", "mlflow", "transformers"} & sys.modules.keys()
"""


def test_the_list_of_commands_imports_none_of_them():
    answer = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    for name, command in (JOBS | BENCHMARKS).items():
        assert f"{name} " in answer.stdout
        assert command.summary in answer.stdout


LOOKING = """
import sys
from typer.testing import CliRunner
from jobs.cli import app
for words in (["list"], ["show", "x"], ["diff", "x", "y"], ["promote", "x"], ["migrate"], ["gc"]):
    outcome = CliRunner().invoke(app, ["registry", *words, "--registry", "sqlite:///nowhere.db"])
    assert (outcome.exit_code, "nowhere.db does not exist" in outcome.output) == (2, True), outcome.output
assert not {"torch", "ray", "transformers"} & sys.modules.keys(), {"torch", "ray", "transformers"} & sys.modules.keys()
"""


def test_looking_at_the_registry_imports_neither_torch_nor_ray():
    answer = subprocess.run([sys.executable, "-c", LOOKING], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    "words",
    [
        *([name] for name in JOBS),
        *(["benchmark", name] for name in BENCHMARKS),
        *(["registry", name] for name in COMMANDS),
        *(["jobs", name] for name in JOB_COMMANDS),
    ],
)
def test_every_command_has_its_help(words):
    outcome = CliRunner().invoke(app, [*words, "--help"])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.startswith(f"Usage: root {' '.join(words)} [OPTIONS]")


def test_a_mistyped_command_is_told_the_nearest():
    outcome = CliRunner().invoke(app, ["lern"])
    assert outcome.exit_code == 2
    assert "Did you mean 'learn'?" in outcome.output


@pytest.mark.parametrize("words", [["jobs.learn", "x.yaml"], ["jobs", "learn", "x.yaml"]])
def test_a_command_run_as_a_module_answers_in_plain_lines(words):
    command = [sys.executable, "-m", *words, "--nope", "an argument that is so long that a box would wrap it, " * 3]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "No such option: --nope" in answer.stderr
    assert not set("│╭") & set(answer.stderr)
