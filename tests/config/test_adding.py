"""The configuration of one task that is added to a pool."""

from pathlib import Path

import pytest

from pipeline.config import AddConfig, ConfigError, load_config

TASK = "task: {name: clock, train: train.parquet, eval: eval.parquet}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "task: Field required"),
        ("task: {name: clock, eval: eval.parquet}\n", "task 'clock' has no `train` source"),
        (TASK + "router: {feature_width: 64}\n", "router.feature_width is the pool's"),
        (TASK + "registry: {pool: mine}\n", "registry.pool: the pool is what --pool names"),
        (TASK + "stream: {}\n", "stream: no such field; `pointsman add --help` lists the fields"),
        ("tasks: {}\n", "tasks: no such field; did you mean `task`"),
        ("task: {name: clock\n", "not valid YAML: line 2: expected"),
        (TASK + "name: data\n", "is what all runs of an output folder share"),
    ],
)
def test_mistakes_name_field_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file, [], AddConfig)


def test_what_is_given_is_known(tmp_path: Path) -> None:
    """All else is taken from the pool."""
    file = tmp_path / "task.yaml"
    file.write_text(TASK + "expert: {r: 4}\n")
    settings = load_config(file, ["router.steps=3", "training.workers=2"], AddConfig)
    assert settings.expert.model_fields_set == {"rank"}
    assert settings.router.model_fields_set == {"steps"}
    assert settings.base.model_fields_set == set()
    assert settings.training.workers == 2
