"""Bases in the registry: `<base>.base` holds one version per checkpoint that pools use.

Pool versions refer to it. A copy in each of them would be 16 GB per task for an 8B base. Where the registry's files are on
this machine, a base is used in place; from elsewhere it is fetched once, to the user's cache.
"""

import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.config import BaseModelConfig, without_secrets
from pipeline.files import current_folder, replace_folder
from pipeline.locks import staging
from pipeline.models import checkpoints
from pipeline.models.checkpoints import BaseError, checkpoint, code_digest, files_of, fingerprint, hub_id
from pipeline.registry.names import base_name, read_name
from pipeline.registry.retries import RegistryError, reason_of, shown_uri
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import DIGEST, create_version, find_version, log_folder, logged_model, versions_of

SERVED = {"dtype", "max_tiles", "trust_remote_code", "attention"}
"""The settings of a base that are registered with a pool: elsewhere it is loaded as here."""


def register_base(base: BaseModelConfig) -> ModelVersion:
    """Uploads a base's checkpoint as a new version, unless it is registered; needs an open run.

    With `base.trust_remote_code` the checkpoint's own code is a part of it.
    """
    run, folder, name = active_run(), checkpoint(base), base_name(base.label)
    digest = _digest(folder, code=base.trust_remote_code)
    if (version := find_version(name, digest)) is not None:
        return version
    params = {DIGEST: digest, "base": base.label, "path": without_secrets(base.path)}
    params |= {"revision": base.revision} if base.revision is not None else {}
    with tempfile.TemporaryDirectory() as scratch:
        for file in files_of(folder, code=base.trust_remote_code):  # a downloaded folder may hold other files
            (Path(scratch) / file.name).symlink_to(file.resolve())
        model_id = log_folder(base.label, Path(scratch), params, model_type="base")
    return create_version(
        name,
        model_id,
        run.info.run_id,
        tags={"fingerprint": digest[:12]},
        description=f"The frozen checkpoint `{params['path']}` that pools of base `{base.label}` answer with.",
    )


def base_folder(model_id: str) -> Path:
    """Returns the folder of a registered base: its location on this machine, or in the user's cache, fetched if need be.

    Of several processes one fetches and the others wait; all fetched files are read and checked. Of a base in place its own
    code is checked, which runs when it is loaded; weights are compared by who loads it. Raises RegistryError where the current
    registry does not have it, or where it is not what was registered.
    """
    try:
        model = MlflowClient().get_logged_model(model_id)
        place = urlsplit(model.artifact_location)
        if place.scheme in ("", "file"):
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=url2pathname(place.path)))
            _check_code(folder, model.params.get(DIGEST, ""))
            return folder
        return _cached(model)
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"this pool needs the base {model_id}, which {shown_uri()} does not have: "
            f"{reason_of(error)}. Set MLFLOW_TRACKING_URI to the registry that the pool comes from"
        ) from None


def find_base(base_label: str, base_fingerprint: str) -> ModelVersion:
    """Returns the version of a base that has a fingerprint; raises RegistryError where there is none."""
    if (version := find_version(base_name(base_label), base_fingerprint)) is not None:
        return version
    for version in versions_of(base_name(base_label)):  # with its own code, which is a part of its digest
        if logged_model(version).params.get(DIGEST, "").startswith(f"{base_fingerprint}."):
            return version
    raise RegistryError(
        f"{base_name(base_label)} has no version with fingerprint {base_fingerprint}: it is registered with the first pool "
        "over it; let the `pointsman learn` that made the expert end, or run it again"
    )


def public_name(version: ModelVersion) -> str:
    """Returns what others call a registered base: its hub id, or the name that it was given, never a path of some machine."""
    named = read_name(version.name)
    assert named is not None, "callers have found it as a base"
    return hub_id(logged_model(version).params["path"]) or named.base


def download_base_files(version: ModelVersion, patterns: Sequence[str], into: Path) -> list[Path]:
    """Copies the files of a registered base whose names match to the folder `into`; its weights are not fetched for that."""
    location = logged_model(version).artifact_location
    names = [Path(item.path).name for item in mlflow.artifacts.list_artifacts(artifact_uri=location)]
    wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    into.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        mlflow.artifacts.download_artifacts(artifact_uri=f"{location}/{name}", dst_path=str(into))
    return [into / name for name in wanted]


def _cached(model: LoggedModel) -> Path:
    """Returns the folder of a base that lies elsewhere, in the user's cache."""
    wanted = model.params.get(DIGEST)
    folder = checkpoints.CACHE / "registered" / (wanted or model.model_id)
    if not _holds(current_folder(folder), wanted):
        with staging(folder, why="which fetches the base") as scratch:
            if not _holds(current_folder(folder), wanted):
                made = scratch / folder.name
                made.mkdir()
                fetched = Path(
                    mlflow.artifacts.download_artifacts(artifact_uri=model.artifact_location, dst_path=str(made))
                )
                if not _holds(fetched, wanted):
                    raise RegistryError(
                        f"the base {model.model_id} at {without_secrets(model.artifact_location)} is not the one that was "
                        f"registered (digest {wanted}): its files have changed; bring them back, or register the pool again"
                    )
                replace_folder(fetched, folder)
    return current_folder(folder)


def _check_code(folder: Path, registered: str) -> None:
    """Raises RegistryError where the Python files of a base with code of its own are not those that were registered."""
    _, has_code, code = registered.partition(".")
    if has_code and code_digest(folder) != code:
        raise RegistryError(
            f"{folder}: the Python files of this base are not those that were registered, and are not run; bring them back, or "
            "register the base again"
        )


def _digest(folder: Path, *, code: bool) -> str:
    return f"{fingerprint(folder)}.{code_digest(folder)}" if code else fingerprint(folder)


def _holds(folder: Path, wanted: str | None) -> bool:
    """Whether a folder holds the base of this digest; of earlier releases, which recorded none, whether it is there."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return wanted is None or _digest(folder, code="." in wanted) == wanted
    except BaseError:
        return False
