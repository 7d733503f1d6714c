"""What the driver says of finished trainings; what trains is in test_run."""

from pathlib import Path

import pytest

from pipeline.routing.adapters import REMEDY, ExpertError
from pipeline.training.session import TrainingError, TrainResult, finished_training, reading_result
from pipeline.training.training_folder import training_folder


def test_a_finished_training_is_found(tmp_path: Path) -> None:
    assert finished_training(tmp_path, "digits", "abc") is None
    training_folder(tmp_path, "digits", "abc").finish({"expert_losses": [1.0]}, lambda folder: None)
    result = finished_training(tmp_path, "digits", "abc")
    assert result is not None
    assert result.already_finished
    assert result.metrics == {"expert_losses": [1.0]}


def test_damage_of_what_a_training_left_says_how_to_train_again(tmp_path: Path) -> None:
    result = TrainResult(tmp_path / "finished", {})
    with pytest.raises(TrainingError) as raised, reading_result("digits", result):
        raise ExpertError(f"adapter_model.safetensors: damaged; {REMEDY}")
    assert str(raised.value) == (
        f"task 'digits': adapter_model.safetensors: damaged; remove the folder {tmp_path}/finished, and the task's training "
        "begins anew"
    )
