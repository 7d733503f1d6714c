"""The statistics of base prompts in the registry: stored once for all pools' versions that have the same, by their digest.

A logged model of its own, without a version: it is whole when it is READY, its age is known, and who may register a pool may
store it. A version refers to it by parameter BASE_PROMPTS, and in its `pool.json`. Read without torch.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException

from pipeline.registry.artifacts import not_here
from pipeline.registry.claims import take_up
from pipeline.registry.retries import RegistryError, is_away, reason_of, shown_uri
from pipeline.registry.versions import DIGEST, FILES, damage, experiment_ids, log_folder

BASE_PROMPTS = "base_prompts"
"""Type of the logged model; and parameter of a pool's version: the digest of the statistics that it refers to."""

FILE = "null.safetensors"
"""Its only file."""

SHA256 = "sha256"
"""Parameter: digest of the file's bytes."""

AGAIN = "bring it back, or run the `pointsman learn` that made the pool again, which stores it anew"


def keep_base_prompts(digest: str, write: Callable[[Path], None], params: Mapping[str, object]) -> None:
    """Has `write` write the statistics and stores them, unless they are there whole; needs an open run.

    `params` are further parameters of the logged model. Of several processes that store the same at the same time each may.
    """
    stored = stored_base_prompts(digest, anew=False)
    if stored is not None and take_up(stored.model_id) and _damage(stored) is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / FILE
        write(file)
        written = {SHA256: _sha256(file), FILES: json.dumps({FILE: file.stat().st_size})}
        log_folder(BASE_PROMPTS, file.parent, {DIGEST: digest, **params, **written}, model_type=BASE_PROMPTS)


def base_prompts_damage(digest: str) -> str | None:
    """Returns what is wrong with the statistics of a digest, as far as a list of files tells; None where nothing is."""
    stored = stored_base_prompts(digest)
    return f"{shown_uri()} does not have them" if stored is None else _damage(stored)


def fetch_base_prompts(digest: str, file: Path) -> None:
    """Copies the statistics of a digest to `file`; raises RegistryError where the current registry does not have them whole."""
    what = f"the statistics of base prompts with digest {digest}"
    stored = stored_base_prompts(digest)
    if stored is None:
        raise RegistryError(
            f"{what}: {shown_uri()} does not have them. Set MLFLOW_TRACKING_URI to the registry that the pool comes from, or "
            "run the `pointsman learn` that made the pool again, which stores them anew"
        )
    address = f"{stored.artifact_location}/{FILE}"
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        try:
            fetched = Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=scratch))
        except (MlflowException, OSError) as error:
            if is_away(error):
                raise
            reason = not_here(stored.artifact_location) or f"{address} is missing ({reason_of(error)}); {AGAIN}"
            raise RegistryError(f"{what}: {reason}") from None
        if _sha256(fetched) != stored.params.get(SHA256):
            raise RegistryError(f"{what}: {address} does not hold what was stored: {_again_after_deleting(stored)}")
        fetched.replace(file)


def _again_after_deleting(stored: LoggedModel) -> str:
    return f"bring that file back, or delete it (logged model {stored.model_id}) and run the pool's `pointsman learn` again"


def stored_base_prompts(digest: str, *, anew: bool = True) -> LoggedModel | None:
    """Returns the newest complete upload of these statistics; None where there is none. For `anew` see `experiment_ids`."""
    experiments, wanted = experiment_ids(anew=anew), f"params.{DIGEST} = '{digest}'"
    models = MlflowClient().search_logged_models(experiments, wanted) if experiments else []
    return max(filter(is_complete, models), key=lambda model: model.creation_timestamp, default=None)


def is_complete(model: LoggedModel) -> bool:
    """Whether a logged model holds statistics of base prompts, all of them."""
    return model.model_type == BASE_PROMPTS and model.status == LoggedModelStatus.READY


def _damage(stored: LoggedModel) -> str | None:
    return damage(stored.artifact_location, json.loads(stored.params.get(FILES, "{}")), [FILE])


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
