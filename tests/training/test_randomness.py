"""Random numbers of ranks, and their state in checkpoints."""

import random
from pathlib import Path

import numpy as np
import torch

from pipeline.training.randomness import load_random_state, save_random_state, seed_all


def draw() -> list[float]:
    return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_ranks_draw_differently_and_the_same_again() -> None:
    drawn = []
    for rank in (0, 1, 0):
        seed_all(3, 1, rank)
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


def test_the_state_goes_on_where_it_was(tmp_path: Path) -> None:
    seed_all(3)
    draw()
    save_random_state(tmp_path / "state.safetensors")
    expected = draw()
    seed_all(4)
    load_random_state(tmp_path / "state.safetensors")
    assert draw() == expected
