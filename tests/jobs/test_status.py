import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from tests.cluster.conftest import ROOT

LOOKING = """
import sys
import pytest
from typer.testing import CliRunner
from jobs.cli import app
outcome = CliRunner().invoke(app, ["status", "--output", "."])
assert outcome.exit_code == 0 and "no runs in ." in outcome.output, outcome.output
assert not {"torch", "ray", "mlflow"} & sys.modules.keys()
"""


@pytest.mark.parametrize("kind", ["", "local://"])
def test_runs_and_their_sweeps(kind: str, tmp_path: Path, monkeypatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "demo"
    for sweep, trials in (("later-1", [{}, {}]), ("later-2", None)):
        (run / "sweeps" / sweep).mkdir(parents=True)
        if trials is not None:
            (run / "sweeps" / sweep / "summary.json").write_text(json.dumps({"trials": trials}))
    (run / "summary.json").write_text("{}")
    (run / "state").mkdir()
    (run / "state" / "status.json").write_text('{"state": "finished"}')
    output = f"{kind}{tmp_path}"
    outcome = CliRunner().invoke(app, ["status", "--output", output, "--json"])
    found = json.loads(outcome.output)
    assert [(run["name"], run["state"]) for run in found["runs"]] == [("demo", "finished")]
    assert [(s["name"], s["state"], s["trials"]) for s in found["sweeps"]] == [
        ("later-1", "finished", 2),
        ("later-2", "begun", None),
    ]
    assert [s["where"] for s in found["sweeps"]] == [
        f"{output}/demo/sweeps/later-1/summary.json",
        f"{output}/demo/sweeps/later-2",
    ]
    assert found["jobs"] is None
    shown = CliRunner().invoke(app, ["status", "--output", output]).output
    assert "demo/later-1" in shown


def test_an_address_that_cannot_be_one_is_told() -> None:
    shown = CliRunner().invoke(app, ["status", "--output", "s4://key:secret@bucket/runs"])
    assert shown.exit_code == 2
    assert shown.output.startswith("error: --output s4://bucket/runs: nobody knows s4://")


def test_looking_needs_no_ray(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    answer = subprocess.run(
        [sys.executable, "-c", LOOKING], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
