"""The untrained tiny base that all tests share, as a checkpoint folder and loaded."""

import os
from pathlib import Path

import pytest
import torch

from pipeline.config import BaseModelConfig
from pipeline.data.demo.abilities import vocabulary
from pipeline.models.bases import Base, load_base
from pipeline.models.tiny import build_tiny, tiny_processor
from pipeline.routing import Pool
from pipeline.routing.store import CACHE_VARIABLE
from tests.helpers import claimed_pool

torch.set_num_threads(1)  # models this small only wait for a second thread, on a busy machine for minutes


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A test may have left more: threads change the last digit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Experts of registered pools are fetched to a folder of the tests, not to the user's cache."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


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
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random InternVL as wide as prompt features must be projected for (width 512).

    Image tokens are a hundred times as long as text embeddings, as in trained bases.
    """
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    processor = tiny_processor(vocabulary())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build_tiny(processor, vision_width=64, vision_layers=1, width=512, layers=2)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings *= 0.4 / embeddings.norm(dim=-1).mean()
        projector = model.model.multi_modal_projector.linear_2
        projector.weight *= 40 / projector.weight.norm(dim=-1).mean() / 512**0.5
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
