"""The untrained tiny base that all tests share, as a checkpoint folder and loaded."""

from pathlib import Path

import pytest
import torch

from pipeline.config import BaseModelConfig
from pipeline.models.bases import Base, load_base
from pipeline.models.tiny import build_tiny, tiny_processor
from pipeline.routing import Pool
from pipeline.streams.embedded.foundation import vocabulary
from tests.helpers import claimed_pool

torch.set_num_threads(1)  # models this small only wait for a second thread, on a busy machine for minutes


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of the tiny InternVL with random weights, always the same."""
    folder = tmp_path_factory.mktemp("checkpoints") / "untrained"
    processor = tiny_processor(vocabulary())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_tiny(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Path) -> Base:
    """The base of `tiny_folder`; tests that change its modules put them back."""
    return load_base(BaseModelConfig(path=str(tiny_folder)))


@pytest.fixture(scope="session")
def known_pool(tiny_base: Base) -> Pool:
    """The pool of `claimed_pool` over the tiny base."""
    return claimed_pool(tiny_base)
