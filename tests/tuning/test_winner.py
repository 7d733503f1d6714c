"""The winner as a configuration."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError, LearnConfig
from pipeline.config.loading import load_config
from tests.tuning.test_space import DEMO, config
from tuning.results import Trial
from tuning.winner import check_file, write_configuration

POINT = {"expert.rank": 12, "expert.learning_rate": 1e-3, "router.shrinkage": 0.2}


def test_it_extends_the_sweeps_own_by_what_differs(tmp_path: Path) -> None:
    settings = config("name=mine", "expert.steps=50")
    file = tmp_path / "deep" / "best.yaml"
    write_configuration(file, Trial(1, POINT, POINT, "done"), config=DEMO, settings=settings)
    values = yaml.safe_load(file.read_text())
    assert (file.parent / values.pop("extends")).resolve() == DEMO
    assert values == {
        "name": "mine",
        "expert": {"rank": 12, "steps": 50, "learning_rate": 1e-3},
        "router": {"shrinkage": 0.2},
    }
    loaded = load_config(file, [], LearnConfig)
    assert (loaded.expert.rank, loaded.expert.steps, loaded.stream) == (12, 50, settings.stream)


def test_rows_that_were_held_out_are_held_out_again(tmp_path: Path) -> None:
    settings = config()
    tasks = (*settings.stream.tasks[:-1], settings.stream.tasks[-1].model_copy(update={"validation": 0.1}))
    settings = settings.model_copy(update={"stream": settings.stream.model_copy(update={"tasks": tasks})})
    file = tmp_path / "best.yaml"
    write_configuration(file, Trial(1, POINT, POINT, "done"), config=DEMO, settings=settings)
    assert load_config(file, [], LearnConfig).stream == settings.stream


def test_a_file_that_cannot_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--apply .*: cannot be written: File exists"):
        check_file(tmp_path / "file" / "x.yaml")
    with pytest.raises(ConfigError, match=r"--apply .*: cannot be written: Is a directory"):
        check_file(tmp_path)
    with pytest.raises(ConfigError, match=r"--apply .*: cannot be written"):
        write_configuration(tmp_path / "file" / "x.yaml", Trial(1, {}, {}, "done"), config=DEMO, settings=config())


def test_it_replaces_an_earlier_winner_and_nothing_else(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: demo.yaml\n")
    with pytest.raises(
        ConfigError, match=r"--apply .*own.yaml: there is a file of that name that no sweep has written"
    ):
        check_file(own)
    best = tmp_path / "new" / "best.yaml"
    for _ in range(2):
        check_file(best)
        write_configuration(best, Trial(1, POINT, POINT, "done"), config=DEMO, settings=config())
