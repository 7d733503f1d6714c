"""Random numbers of a training worker: a stream of its own for every rank, kept in its checkpoints.

Dropout draws from it. The state goes into a safetensors file, so that a run which goes on draws what it would have drawn.
"""

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file


def seed_all(*parts: int) -> None:
    """Seeds Python, numpy and torch (GPUs as well) by all of `parts` together, such as a seed, a stage and a rank."""
    python, numpy, torch_ = (int(word) for word in np.random.SeedSequence(parts).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_)


def save_random_state(file: Path) -> None:
    """Writes the state of all generators."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": np.array(words, dtype=np.uint32),
        "python_gauss": np.array([] if gauss is None else [gauss], dtype=np.float64),
        "numpy": np.asarray(keys, dtype=np.uint32),
        "numpy_gauss": np.array([position, has_gauss, cached], dtype=np.float64),
        "torch": torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy()
    save_file(state, file)


def load_random_state(file: Path) -> None:
    """Puts all generators where they were when `file` was written."""
    state = load_file(file)
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss, cached = state["numpy_gauss"].tolist()
    np.random.set_state(("MT19937", state["numpy"], int(position), int(has_gauss), cached))
    torch.set_rng_state(torch.from_numpy(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda"]))
