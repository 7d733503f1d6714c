"""The strays of a pool's version: evaluation prompts that were not routed to their own expert, or to the base.

`evaluation/strays.json` among its artifacts. All other prompts are answered by whom they belong to, so two versions are
compared prompt by prompt without routing any of them again, whatever the number of experts.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.registry.retries import RegistryError, is_away
from pipeline.registry.versions import logged_model, logged_model_id

FOLDER = "evaluation"
"""Folder of what an evaluation leaves among a version's artifacts."""

FILE = "strays.json"

SHOWN = 160
"""Most characters of a question that are kept."""

BASE = "base"
"""Who answers where no expert does."""


class RoutedPrompt(NamedTuple):
    """A prompt and who answers it."""

    id: str
    question: str
    expert: str
    """An expert, or `base`."""


@dataclass(frozen=True)
class Strays:
    """The strays among the evaluation prompts of one task or base ability."""

    digest: str
    """Digest of the evaluation prompts (`Score.digest`)."""
    own: str
    """Who answers all others: the task's expert, or `base`."""
    prompts: Sequence[RoutedPrompt]

    def retiring(self, expert: str) -> "Strays":
        """Returns what becomes of them when the base answers in the place of an expert."""
        moved = [p._replace(expert=BASE) if p.expert == expert else p for p in self.prompts]
        own = BASE if self.own == expert else self.own
        return Strays(self.digest, own, [p for p in moved if p.expert != own])


@dataclass(frozen=True)
class Moved:
    """A prompt that changes hands from one version to another."""

    dataset: str
    """Task or base ability."""
    id: str
    question: str
    before: str
    """Who answers it in the one version: an expert, or `base`."""
    after: str
    """Who answers it in the other."""


def keep_strays(version: ModelVersion, strays: Mapping[str, Strays]) -> None:
    """Uploads the strays of a version by task and base ability."""
    plain = {name: _plain(name, s) for name, s in strays.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / FOLDER
        folder.mkdir()
        (folder / FILE).write_text(json.dumps(plain, ensure_ascii=False, separators=(",", ":")))
        MlflowClient().log_model_artifacts(logged_model_id(version), scratch)


def _plain(name: str, strays: Strays) -> dict[str, Any]:
    """Returns what is written of a task or base ability: of most the digest alone, since this grows with their number."""
    plain: dict[str, Any] = {"digest": strays.digest}
    if strays.own != name:
        plain["own"] = strays.own
    if strays.prompts:
        plain["prompts"] = [[p.id, p.question[:SHOWN], p.expert] for p in strays.prompts]
    return plain


def strays_of(version: ModelVersion) -> dict[str, Strays] | None:
    """Returns the strays of a version by task and base ability; None where it has none noted: not evaluated, or earlier."""
    address = f"{logged_model(version).artifact_location}/{FOLDER}/{FILE}"
    try:
        plain = json.loads(mlflow.artifacts.load_text(address))
        return {
            name: Strays(of["digest"], of.get("own", name), [RoutedPrompt(*prompt) for prompt in of.get("prompts", ())])
            for name, of in plain.items()
        }
    except MlflowException as error:
        if is_away(error):
            raise
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RegistryError(
            f"{version.name}/{version.version} is damaged: {address} cannot be read ({error}); delete that file: then no "
            "prompts are known that its experts take from others"
        ) from None


def moved_prompts(before: Mapping[str, Strays], after: Mapping[str, Strays]) -> list[Moved]:
    """Returns the prompts that change hands, of the evaluation prompts that both versions were evaluated on."""
    moved = []
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.digest != old.digest:
            continue
        first, second = ({(p.id, p.question): p.expert for p in strays.prompts} for strays in (old, new))
        for prompt in first | second:
            hands = first.get(prompt, old.own), second.get(prompt, new.own)
            if hands[0] != hands[1]:
                moved.append(Moved(name, *prompt, *hands))
    return moved
