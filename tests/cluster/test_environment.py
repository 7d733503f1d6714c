import os
from pathlib import Path

import pytest

from cluster.environment import FILE, VariableError, apply, is_given, to_bytes, travelling


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_names_are_looked_for_here_then_in_the_file_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("# keys\nexport WORD='from file'\nKEY=in-file\nOTHER=stays\n")
    monkeypatch.setenv("KEY", "exported")
    assert travelling(["KEY", "WORD"]) == {"KEY": "exported", "WORD": "from file"}
    assert travelling([], Path(".env")) == {"WORD": "from file", "KEY": "in-file", "OTHER": "stays"}


def test_registry_and_models_travel_unasked_but_not_a_file_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("HF_HOME", "/models")
    assert travelling([]) == {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "HF_HOME": "/models"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert travelling([]) == {"HF_HOME": "/models"}


def test_mistakes_name_the_option_and_no_value() -> None:
    with pytest.raises(VariableError, match="--env NOWHERE: neither"):
        travelling(["NOWHERE"])
    with pytest.raises(VariableError, match="--env KEY=...: give the name alone") as error:
        travelling(["KEY=secret"])
    assert "secret" not in str(error.value)
    with pytest.raises(VariableError, match="--env-file keys: no such file"):
        travelling([], Path("keys"))


def test_a_process_of_the_job_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    apply(tmp_path)
    assert not is_given(tmp_path)
    (tmp_path / FILE).write_bytes(to_bytes({"KEY": "secret", "HF_HOME": "/not/here"}))
    apply(tmp_path)
    assert os.environ["KEY"] == "secret"
    assert "HF_HOME" not in os.environ
