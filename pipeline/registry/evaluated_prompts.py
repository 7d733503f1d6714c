"""The evaluation prompts of an expert, kept beside it: a pool that it joins later is measured on them without earlier data.

`evaluation/<digest>.parquet` among the artifacts of the expert's version; that of a base ability lies with the base. It holds
each prompt's features, by which every router can choose again, and its score when the expert, or the base, answers.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.registry.retries import RegistryError, is_away
from pipeline.registry.strays import FOLDER, SHOWN
from pipeline.registry.versions import logged_model, logged_model_id
from pipeline.routing.features import FEATURE_RULE

_RULE = b"feature_rule"


@dataclass(frozen=True, eq=False)
class EvaluatedPrompts:
    """The evaluation prompts of a task or base ability: N prompts, F features."""

    ids: Sequence[str]
    questions: Sequence[str]
    """Their first SHOWN characters."""
    groups: Sequence[str]
    """Prompts of one group are one question; empty: a question of its own."""
    features_NF: np.ndarray
    """float32."""
    own_N: np.ndarray
    """Score by the task's metric (0 to 1) when its expert answers; NaN where that was not seen, and for base abilities."""
    base_N: np.ndarray
    """The same when the frozen base answers."""

    def write(self, file: Path) -> None:
        """Writes a parquet file."""
        flat = pa.array(np.ascontiguousarray(self.features_NF, np.float32).ravel())
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "question": pa.array([question[:SHOWN] for question in self.questions], pa.string()),
            "group": pa.array(self.groups, pa.string()),
            "features": pa.FixedSizeListArray.from_arrays(flat, self.features_NF.shape[1]),
            "own": pa.array(self.own_N, pa.float64()),
            "base": pa.array(self.base_N, pa.float64()),
        }
        pq.write_table(pa.table(columns).replace_schema_metadata({_RULE: str(FEATURE_RULE)}), file)

    @classmethod
    def read(cls, file: Path) -> "EvaluatedPrompts | None":
        """Reads what `write` wrote; None where the features follow another rule than this code's."""
        table = pq.read_table(file)
        if (table.schema.metadata or {}).get(_RULE) != str(FEATURE_RULE).encode():
            return None
        flat = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        ids, questions, groups = (table[name].to_pylist() for name in ("id", "question", "group"))
        own_N, base_N = table["own"].to_numpy(), table["base"].to_numpy()
        return cls(ids, questions, groups, flat.reshape(len(table), -1), own_N, base_N)


def has_prompts(version: ModelVersion, digest: str) -> bool:
    """Whether a version keeps the evaluation prompts of this digest (`Score.digest`)."""
    location = f"{logged_model(version).artifact_location}/{FOLDER}"
    return any(Path(item.path).stem == digest for item in mlflow.artifacts.list_artifacts(artifact_uri=location))


def keep_prompts(version: ModelVersion, digest: str, prompts: EvaluatedPrompts) -> None:
    """Uploads evaluation prompts beside the expert or base of a version."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / FOLDER
        folder.mkdir()
        prompts.write(folder / f"{digest}.parquet")
        MlflowClient().log_model_artifacts(logged_model_id(version), scratch)


def kept_prompts(version: ModelVersion, digest: str) -> EvaluatedPrompts | None:
    """Returns the evaluation prompts of this digest that a version keeps; None where it has none that this code can use."""
    if not has_prompts(version, digest):
        return None
    address = f"{logged_model(version).artifact_location}/{FOLDER}/{digest}.parquet"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return EvaluatedPrompts.read(
                Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=scratch))
            )
        except (MlflowException, OSError, ValueError, LookupError) as error:
            if isinstance(error, MlflowException) and is_away(error):
                raise
            raise RegistryError(
                f"{version.name}/{version.version} is damaged: {address} cannot be read ({error}); delete that file: its "
                "`pointsman learn`, run again, writes it anew"
            ) from None
