"""Pools in the registry: `<base>.pool` holds a version per pool, each a model that answers prompts by itself.

`mlflow.pyfunc.load_model("models:/<base>.pool@champion").predict(...)` and `mlflow models serve` need only the registry: a
version holds router settings, statistics of base prompts and code, and refers to its experts and its base, so its size does
not grow with the number of experts. Alias `champion` marks the version in use; moving it rolls back.
"""

import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType

import pipeline
from pipeline.config import BaseModelConfig
from pipeline.registry import pyfunc_model
from pipeline.registry.bases import register_base
from pipeline.registry.experts import experts_name, reference_to
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import (
    DIGEST,
    MODELS,
    create_version,
    find_finished,
    get_version,
    log_lineage,
    log_model,
    logged_model,
)
from pipeline.routing.pool import CARD, Pool

CHAMPION = "champion"
"""Alias of the pool version in use."""

SIGNATURE = ModelSignature(
    inputs=Schema([
        ColSpec(DataType.string, "prompt"),
        # Not `binary`: MLflow's JSON reader cannot decode a null there, and text-only rows are normal.
        ColSpec(AnyType(), "image", required=False),
    ]),
    outputs=Schema([ColSpec(DataType.string, "answer"), ColSpec(DataType.string, "expert")]),
    params=ParamSchema([
        ParamSpec("max_new_tokens", DataType.long, pyfunc_model.MAX_NEW_TOKENS),
        ParamSpec("batch_size", DataType.long, pyfunc_model.BATCH_SIZE),
    ]),
)  # fmt: skip
"""`prompt` as text, `image` as encoded bytes, base64 text or null; answers and experts."""

LISTED = 12
"""Most experts in a version's tag; `pool.json` lists them all."""

_ADDRESS = re.compile(rf"{MODELS}(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")

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


def pool_name(base_label: str) -> str:
    """Returns the registered model that holds the pools over a base."""
    return f"{base_label}.pool"


def register_pool(
    pool: Pool,
    base: BaseModelConfig,
    *,
    digest: str,
    experts: Mapping[str, ModelVersion],
    expert_memory: int | None = None,
) -> ModelVersion:
    """Registers a pool as a new version and makes it champion, with its base if that is new; needs an open run.

    `digest` identifies the pool; `experts` are the versions of its experts by name, to which `pool.json` refers; versions of
    other runs become inputs of this run. No weights are read, and no tag grows with the number of experts. If a pool with the
    same digest exists, it is returned and `champion` does not move: someone may have rolled back. `expert_memory` (bytes) is
    the default limit of the experts' weights where the pool is loaded.

    Raises RegistryError where `experts` and the pool differ.
    """
    run = active_run()
    _check_versions(pool, experts)
    name = pool_name(pool.base_label)
    if (version := find_pool(pool.base_label, digest)) is not None:
        return version
    tags = {
        DIGEST: digest,
        "base_label": pool.base_label,
        "base_fingerprint": pool.base_fingerprint,
        "null_expert": bool(pool.null),
        "experts": _listed([f"{expert} {experts[expert].version}" for expert in pool.names]),
        "experts_model": experts_name(pool.base_label),
        **{f"router.{key}": value for key, value in pool.router.model_dump().items()},
    }
    base_version = register_base(base)
    tags["base_version"] = base_version.version
    log_lineage(run.info.run_id, experts.values())
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # An example would make MLflow load and run the whole model before it logs it; the signature is our own.
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        references = {expert: reference_to(expert, version) for expert, version in experts.items()}
        folder = pool.refer(Path(scratch) / "pool", references)

        def write(model: LoggedModel) -> Path:
            mlflow.pyfunc.save_model(
                Path(scratch) / "model",
                mlflow_model=Model(
                    model.artifact_location, run.info.run_id, model_uuid=model.model_id, model_id=model.model_id
                ),
                python_model=pyfunc_model.__file__,
                artifacts={"pool": str(folder)},
                code_paths=[str(_copy_code(Path(scratch) / "code"))],
                signature=SIGNATURE,
                pip_requirements=pip_requirements(),
                model_config={
                    "base_model_id": logged_model(base_version),
                    "expert_memory": expert_memory,
                    **base.model_dump(include={"dtype", "max_tiles", "trust_remote_code"}),
                },
            )
            return Path(scratch) / "model"

        model_id = log_model("pool", write, tags, model_type="pool")
    about = f"Pools of experts over {pool.base_label}; alias `{CHAMPION}` marks the one in use"
    return create_version(name, model_id, run.info.run_id, tags, alias=CHAMPION, about=about)


def _listed(experts: Sequence[str]) -> str:
    """Lists the newest experts first, with the number of those left out."""
    newest, more = list(reversed(experts[-LISTED:])), len(experts) - LISTED
    return ", ".join(newest) + (f" and {more} more" if more > 0 else "")


def _check_versions(pool: Pool, experts: Mapping[str, ModelVersion]) -> None:
    """Raises RegistryError where versions are not those of a pool's experts."""
    if set(pool.names) != set(experts) or not experts:
        raise RegistryError(
            f"the pool holds {', '.join(pool.names) or 'no expert'}, versions are given for "
            f"{', '.join(experts) or 'none'}; register each of its experts first and pass those versions"
        )
    for name, digest in zip(pool.names, pool.digests, strict=True):
        version = experts[name]
        if (registered := version.tags.get(DIGEST)) != digest:
            raise RegistryError(
                f"expert {name!r} of the pool has digest {digest}, version {version.version} of {version.name} has "
                f"{registered}; pass the version that was registered of this expert"
            )


def find_pool(base_label: str, digest: str) -> ModelVersion | None:
    """Returns the finished pool made from `digest`, or None."""
    return find_finished(pool_name(base_label), digest)


def download_pool(address: str, into: str | Path) -> Path:
    """Copies the folder of a registered pool below `into`; returns it. An earlier release may have written it.

    The folder refers to its experts (see `experts.registered_experts`); pools of earlier releases contain them.

    `address` is `models:/<name>/<version>` or `models:/<name>@<alias>`. Raises RegistryError for any other address, and for a
    missing version, with the available ones.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise RegistryError(
            f"{address!r} is not a pool's address; write it like models:/tiny.pool/3 or models:/tiny.pool@{CHAMPION}"
        )
    version = get_version(match["name"], match["version"] or match["alias"])
    location = MlflowClient().get_logged_model(logged_model(version)).artifact_location
    if not any(Path(item.path).name == "artifacts" for item in mlflow.artifacts.list_artifacts(artifact_uri=location)):
        raise RegistryError(f"{address}: {version.name!r} is no pool; pools are the versions of <base>.pool")
    folder = mlflow.artifacts.download_artifacts(artifact_uri=f"{location}/artifacts", dst_path=str(into))
    return next(card.parent for card in Path(folder).rglob(CARD))


def promote(base_label: str, version: int | str) -> ModelVersion:
    """Makes a finished version, newer or older, the champion.

    Raises RegistryError if there is none.
    """
    chosen = get_version(pool_name(base_label), version)
    MlflowClient().set_registered_model_alias(pool_name(base_label), CHAMPION, chosen.version)
    return chosen


def champion(base_label: str) -> ModelVersion:
    """Returns the pool version in use; raises RegistryError if there is none."""
    return get_version(pool_name(base_label), CHAMPION)


def pip_requirements() -> list[str]:
    """Returns requirements of prediction at the installed versions (without local parts such as `+cpu`, which PyPI lacks)."""
    return [f"{package}=={installed(package).partition('+')[0]}" for package in _REQUIREMENTS]


def _copy_code(scratch: Path) -> Path:
    """Copies the package's Python files, without the shipped weights: the base artifact holds them."""
    package = Path(pipeline.__file__).parent
    for source in package.rglob("*.py"):
        target = scratch / package.name / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return scratch / package.name
