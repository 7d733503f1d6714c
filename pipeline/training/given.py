"""A LoRA that was trained elsewhere, on its way to the ranks: through the run's storage, which all nodes see.

<storage>/given/<content>/    a stock PEFT folder, named by the digest of what it computes
"""

from pathlib import Path

from pipeline.locks import made_once
from pipeline.routing.adapters import ExpertError, load_adapters
from pipeline.routing.foreign import ForeignAdapter, content_of
from pipeline.storage.mirror import Folder, Mirror
from pipeline.training.spec import GivenAdapter

GIVEN = "given"


def give(adapter: ForeignAdapter, storage: Folder) -> GivenAdapter:
    """Puts an adapter's weights into a run's storage, unless they are there; returns what a training's `spec` says of it."""
    given = GivenAdapter(content=adapter.content, source=adapter.source, rank=adapter.rank, alpha=adapter.alpha)
    place = Mirror.of(storage)
    made_once(place.local / _name(given), adapter.save, why="which copies the given adapter")
    place.share(_name(given))
    return given


def given_folder(given: GivenAdapter, storage: Folder) -> Path:
    """Returns the folder of a given adapter; raises ExpertError where it is not there, or does not hold what was given."""
    folder = Mirror.of(storage).fetched(_name(given))
    _, adapters = load_adapters(folder)
    if content_of(adapters, given.rank, given.alpha) != given.content:
        raise ExpertError(f"{folder}: does not hold the adapter that was given; remove the folder, and give it again")
    return folder


def _name(given: GivenAdapter) -> str:
    return f"{GIVEN}/{given.content}"
