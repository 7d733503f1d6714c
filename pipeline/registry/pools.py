"""Pools in the registry: `<base>.pool.<name>` holds a version per task learned, each a model that answers prompts by itself.

`mlflow.pyfunc.load_model("models:/<base>.pool.<name>@champion").predict(...)` and `mlflow models serve` need only the registry:
a version holds router settings and code, and refers to its experts, its base and the statistics of base prompts, so its size
grows neither with the number of experts nor with that of prompt features. Which version is in use says `promotion`.
"""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from pipeline.config import BaseModelConfig
from pipeline.registry import pyfunc_model
from pipeline.registry.base_prompts import BASE_PROMPTS, keep_base_prompts
from pipeline.registry.bases import SERVED, register_base
from pipeline.registry.descriptions import Measured, pool_description
from pipeline.registry.experts import reference_to
from pipeline.registry.names import no_pool, pool_name, read_name
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, tags_of
from pipeline.registry.served_code import copy_code
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import (
    DIGEST,
    EVALUATED,
    FILES,
    REGISTERED,
    create_version,
    find_version,
    log_lineage,
    log_model,
    logged_model,
    logged_model_id,
)
from pipeline.routing.null import write_null
from pipeline.routing.pool import Pool
from pipeline.routing.store import ExpertReference, StoredExpert

SIGNATURE = ModelSignature(
    inputs=Schema([
        ColSpec(DataType.string, "prompt"),
        # Bytes pass as well. Not `binary`: MLflow's JSON reader cannot decode a null there, and text-only rows are normal; nor
        # `AnyType`, with which its CSV reader fails and sends its traceback.
        ColSpec(DataType.string, "image", required=False),
    ]),
    outputs=Schema([ColSpec(DataType.string, name, required=False) for name in pyfunc_model.OUTPUTS]),
    params=ParamSchema([
        ParamSpec("max_new_tokens", DataType.long, pyfunc_model.MAX_NEW_TOKENS),
        ParamSpec("batch_size", DataType.long, pyfunc_model.BATCH_SIZE),
    ]),
)  # fmt: skip
"""`prompt` as text, `image` as encoded bytes, base64 text or null; answers and experts, or why a row has none."""

MADE_OF = "made_of"
"""Parameter of a pool: number of the version of which it is a change."""

LISTED = 3
"""Most tasks in a version's tag; its description has them all."""

_REQUIREMENTS = (
    "mlflow",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "pyyaml",
)


def register_pool(
    pool: Pool,
    base: BaseModelConfig,
    *,
    name: str,
    digest: str,
    experts: Mapping[str, ModelVersion],
    expert_memory: int | None = None,
) -> ModelVersion:
    """Registers a pool as a new version of the pool `name`, with its base if that is new; needs an open run.

    `digest` identifies the pool; `experts` are the versions of its experts by name, to which `pool.json` refers; versions of
    other runs become inputs of this run. No weights are read. If the pool has a version with the same digest, that is
    returned; its statistics of base prompts are stored anew if they were lost. No alias moves. `expert_memory` (bytes) is the
    default limit of the experts' weights where the pool is loaded.

    Raises RegistryError where `experts` and the pool differ.
    """
    references = _references(pool, experts)
    if (version := find_pool(pool.base_label, name, digest)) is not None:
        if BASE_PROMPTS in logged_model(version).params:
            _keep_base_prompts(pool)
        return version
    base_version = register_base(base)
    served = {
        "base_model_id": logged_model_id(base_version),
        "expert_memory": expert_memory,
        **base.model_dump(include=SERVED),
    }
    log_lineage(active_run().info.run_id, experts.values())
    return create_pool_version(pool, name, digest, references, served, str(base_version.version))


def create_pool_version(
    pool: Pool,
    name: str,
    digest: str,
    references: Mapping[str, ExpertReference],
    served: Mapping[str, Any],
    base_version: str,
    scores: Sequence[Score] = (),
    *,
    made_of: int | None = None,
) -> ModelVersion:
    """Makes a pool the next version of `name`; needs an open run. No weights are read.

    `served` is how its base is loaded (`model_config` of MLflow), `base_version` the version of the registered base,
    `made_of` the number of the version of which this is a change.
    """
    run = active_run()
    _keep_base_prompts(pool)  # before there is a version that refers to them
    null_digest = pool.card.null_digest
    params = {
        DIGEST: digest,
        "base": pool.base_label,
        "base_fingerprint": pool.base_fingerprint,
        "base_version": base_version,
        "null_expert": bool(pool.null),
        **({BASE_PROMPTS: null_digest} if null_digest is not None else {}),
        "experts": len(pool.names),
        "retired": len(pool.retired),
        **({MADE_OF: made_of} if made_of is not None else {}),
        **{f"router.{key}": value for key, value in pool.router.model_dump().items()},
    }
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # An example would make MLflow load and run the whole model before it logs it; the signature is our own.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        folder = pool.refer(Path(scratch) / "pool", references)
        params[FILES] = json.dumps({file.name: file.stat().st_size for file in sorted(folder.iterdir())})

        def write(model: LoggedModel) -> Path:
            code = copy_code(Path(scratch) / "code")
            with code.importable():
                mlflow.pyfunc.save_model(
                    Path(scratch) / "model",
                    mlflow_model=Model(
                        model.artifact_location, run.info.run_id, model_uuid=model.model_id, model_id=model.model_id
                    ),
                    python_model=str(code.script),
                    artifacts={"pool": str(folder)},
                    code_paths=[str(code.archive)],
                    signature=SIGNATURE,
                    pip_requirements=pip_requirements(),
                    model_config=dict(served),
                )
            return Path(scratch) / "model"

        model_id = log_model(name, write, params, model_type="pool")
    in_use = [expert for expert in pool.names if expert not in pool.retired]
    numbers = {expert: version for expert, version in numbers_of(pool, references).items() if expert in in_use}
    return create_version(
        pool_name(pool.base_label, name),
        model_id,
        run.info.run_id,
        tags={"tasks": _listed(in_use) or "none", "status": EVALUATED if scores else REGISTERED} | tags_of(scores),
        description=pool_description(
            pool.base_label,
            name,
            numbers,
            pool.router.kind,
            retired=pool.retired,
            measured=Measured(scores) if scores else None,
        ),
    )


def _keep_base_prompts(pool: Pool) -> None:
    digest = pool.card.null_digest
    if digest is not None:
        params = {"base": pool.base_label, "base_fingerprint": pool.base_fingerprint, "components": len(pool.null)}
        keep_base_prompts(digest, lambda file: write_null(file, pool.null, pool.null_layer_statistics), params)


def served_settings(version: ModelVersion) -> dict[str, Any]:
    """Returns how a registered pool is loaded: `base_model_id`, `expert_memory`, and settings of its base (`bases.SERVED`).

    Raises RegistryError for an expert or a base.
    """
    if (named := read_name(version.name)) is not None and named.kind != "pool":
        raise RegistryError(f"{version.name}/{version.version}: {no_pool(version.name)}")
    location = logged_model(version).artifact_location
    with tempfile.TemporaryDirectory() as scratch:
        card = mlflow.artifacts.download_artifacts(artifact_uri=f"{location}/MLmodel", dst_path=scratch)
        return dict(Model.load(card).flavors["python_function"]["config"])


def numbers_of(pool: Pool, references: Mapping[str, ExpertReference]) -> dict[str, int]:
    """Returns the versions of a pool's experts by name, in the pool's order."""
    return {name: references[name].version or 0 for name in pool.names}


def _listed(experts: Sequence[str]) -> str:
    """Lists the newest experts first, with the number of those left out."""
    newest, more = list(reversed(experts[-LISTED:])), len(experts) - LISTED
    return ", ".join(newest) + (f" and {more} more" if more > 0 else "")


def _references(pool: Pool, experts: Mapping[str, ModelVersion]) -> dict[str, ExpertReference]:
    """Returns the references to a pool's experts; raises RegistryError where versions are not those of its experts."""
    if set(pool.names) != set(experts) or not experts:
        raise RegistryError(
            f"the pool holds {', '.join(pool.names) or 'no expert'}, versions are given for "
            f"{', '.join(experts) or 'none'}; register each of its experts first and pass those versions"
        )
    references = {}
    for name, digest in zip(pool.names, pool.digests, strict=True):
        version, entry = experts[name], pool.experts.entries[name]
        reference = entry.reference if isinstance(entry, StoredExpert) else None
        # What a stream has just registered says so itself; the registry is asked for others only.
        if reference is None or (reference.model, reference.version) != (version.name, int(version.version)):
            reference = reference_to(name, version)
        if reference.digest != digest:
            raise RegistryError(
                f"expert {name!r} of the pool has digest {digest}, version {version.version} of {version.name} has "
                f"{reference.digest}; pass the version that was registered of this expert"
            )
        references[name] = reference
    return references


def find_pool(base_label: str, name: str, digest: str) -> ModelVersion | None:
    """Returns the version of a pool made from `digest`, or None."""
    return find_version(pool_name(base_label, name), digest)


def pip_requirements() -> list[str]:
    """Returns requirements of prediction at the installed versions (without local parts such as `+cpu`, which PyPI lacks)."""
    return [f"{package}=={installed(package).partition('+')[0]}" for package in _REQUIREMENTS]
