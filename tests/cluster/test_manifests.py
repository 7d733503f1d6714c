"""The cluster's files agree with one another, with the configuration they run, and with published schemas."""

import configparser
import json
import re
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import mlflow.cli
import pytest
import ray
import yaml
from sqlalchemy import make_url

from pipeline.config import LearnConfig, load_config
from tests.cluster import kuberay

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "cluster"
KUBERNETES = FILES / "kubernetes"
CONFIG = load_config(ROOT / "jobs" / "configs" / "internvl2_2b.yaml", [], LearnConfig)
DOCKERFILE = (FILES / "Dockerfile").read_text()
MLFLOW_DOCKERFILE = (FILES / "mlflow.Dockerfile").read_text()
AWS = yaml.safe_load((FILES / "ray-cluster.yaml").read_text())
COMPOSE = yaml.safe_load((FILES / "mlflow-compose.yaml").read_text())
(CLAIM,), (JOB,), (CRON_JOB,), (CLUSTER,), MLFLOW = (
    list(yaml.safe_load_all((KUBERNETES / f"{name}.yaml").read_text()))
    for name in ("storage", "rayjob", "raycronjob", "raycluster", "mlflow")
)


def merged(resource: Any, patch: Any) -> Any:
    """Returns a resource with a patch as `kubectl patch --type merge` lays it on (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    resource = dict(resource) if isinstance(resource, dict) else {}
    for name, value in patch.items():
        if value is None:
            resource.pop(name, None)
        else:
            resource[name] = merged(resource.get(name), value)
    return resource


QUEUED = merged(JOB, yaml.safe_load((KUBERNETES / "kueue-patch.yaml").read_text()))
RESOURCES = {"rayjob": JOB, "raycronjob": CRON_JOB, "raycluster": CLUSTER, "rayjob in a queue": QUEUED}
PODS = [pod["spec"] for resource in RESOURCES.values() for pod in kuberay.pods_of(resource)]
SERVER = next(r for r in MLFLOW if r["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("name", RESOURCES)
def test_resources_of_kuberay_are_as_its_reference_says(name) -> None:
    kuberay.validate(RESOURCES[name])
    for pod in kuberay.pods_of(RESOURCES[name]):
        kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize(
    "wrong", [{"entryPoint": "x"}, {"ttlSecondsAfterFinished": 1}, {"preRunningDeadlineSeconds": 0}]
)
def test_a_mistyped_or_excluded_field_would_be_found(wrong) -> None:
    with pytest.raises(jsonschema.ValidationError):
        kuberay.validate(merged(JOB, {"spec": wrong}))


@pytest.mark.parametrize("resource", [CLAIM, *MLFLOW], ids=lambda r: f"{r['kind']} {r['metadata']['name']}")
def test_resources_of_kubernetes_have_its_schema(resource) -> None:
    kubernetes_validate.validate(resource, "1.37", strict=True)


def test_image_is_the_same_everywhere_and_has_the_installed_ray() -> None:
    image = re.search(r"docker build .* -t (\S+) ", DOCKERFILE)
    assert image is not None
    assert {pod["containers"][0]["image"] for pod in PODS} == {image[1]} == {AWS["docker"]["image"]}
    assert f"FROM rayproject/ray:{ray.__version__}-py311-gpu" in DOCKERFILE
    for resource in RESOURCES.values():
        assert kuberay.cluster_of(resource)["rayVersion"] == ray.__version__


def test_entrypoint_exists_and_starts_in_the_images_folder() -> None:
    python, flag, module, config = JOB["spec"]["entrypoint"].split()
    assert (python, flag) == ("python", "-m")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert load_config(ROOT / config, [], LearnConfig) == CONFIG
    folder = re.search(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    assert folder is not None
    assert {pod["containers"][0]["workingDir"] for pod in PODS} == {folder[1]}
    assert folder[1] in AWS["file_mounts"]
    *nightly, stream = CRON_JOB["spec"]["jobTemplate"]["entrypoint"].split()
    assert nightly == [python, flag, module]
    assert stream.startswith("/mnt/pointsman/"), "tasks are added in the storage, not in the image"


@pytest.mark.parametrize("pod", PODS)
def test_pods_share_the_volume_that_the_configuration_writes_to(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert Path(CONFIG.output).is_relative_to(mounts["data"])
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {CLAIM["metadata"]["name"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    for variable in container["env"]:
        assert "PASSWORD" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]


@pytest.mark.parametrize("job", [JOB["spec"], QUEUED["spec"], CRON_JOB["spec"]["jobTemplate"]])
def test_a_job_has_the_gpus_and_cpus_of_the_configuration(job) -> None:
    [group] = job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == CONFIG.training.workers
    assert int(limits["cpu"]) > CONFIG.training.cpus_per_worker, "nothing left for Ray Data"
    assert job["backoffLimit"] > 0
    assert job["preRunningDeadlineSeconds"] < job["activeDeadlineSeconds"]


def test_gpus_go_at_once_and_the_rest_later() -> None:
    """After every failure: a job that took too long, or was never submitted, has no `jobStatus`."""
    for job in (JOB["spec"], CRON_JOB["spec"]["jobTemplate"]):
        rules = job["deletionStrategy"]["deletionRules"]
        for end in ({"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"}):
            mine = [rule for rule in rules if rule["condition"].items() >= end.items()]
            assert mine[0] == {"policy": "DeleteWorkers", "condition": end | {"ttlSeconds": 0}}
            assert all(a["condition"]["ttlSeconds"] < b["condition"]["ttlSeconds"] for a, b in pairwise(mine))


def test_a_queued_job_is_as_kueue_wants_it() -> None:
    assert QUEUED["spec"]["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in QUEUED["spec"]
    assert "kueue.x-k8s.io/queue-name" in QUEUED["metadata"]["labels"]
    assert not QUEUED["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")


def test_whoever_reaches_a_head_needs_its_token() -> None:
    assert all(kuberay.cluster_of(resource)["authOptions"] == {"mode": "token"} for resource in RESOURCES.values())


def test_the_cluster_that_stays_holds_no_gpu_without_work_and_can_hold_the_configuration() -> None:
    groups = CLUSTER["spec"]["workerGroupSpecs"]
    assert CLUSTER["spec"]["enableInTreeAutoscaling"] is True
    assert [group["minReplicas"] for group in groups] == [0] * len(groups)
    assert all(group["maxReplicas"] >= CONFIG.training.workers for group in groups)
    assert len({group["labels"]["ray.io/market-type"] for group in groups}) == len(groups)


def test_aws_file_has_rays_schema_and_the_gpus_of_the_configuration() -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(AWS, json.loads(schema.read_text()))
    gpu = AWS["available_node_types"]["gpu"]
    assert AWS["head_node_type"] in AWS["available_node_types"]
    assert gpu["max_workers"] == AWS["max_workers"]
    assert gpu["max_workers"] * gpu["resources"]["GPU"] == CONFIG.training.workers
    assert gpu["resources"]["CPU"] > CONFIG.training.cpus_per_worker
    assert any(option.endswith(":/mnt/pointsman") for option in AWS["docker"]["run_options"])


def test_aws_dashboard_is_on_loopback_with_a_token() -> None:
    [start] = [command for command in AWS["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    for command in (start, AWS["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    assert "/home/ray/.ray/auth_token" in AWS["file_mounts"]


def test_the_mlflow_file_starts_the_installed_release_with_options_that_it_has() -> None:
    server = COMPOSE["services"]["mlflow"]
    assert (FILES / server["build"]["dockerfile"]).read_text() == MLFLOW_DOCKERFILE
    assert f"mlflow[auth]=={mlflow.__version__}" in MLFLOW_DOCKERFILE
    assert SERVER["image"] in MLFLOW_DOCKERFILE
    job, *options = server["command"]
    assert job == SERVER["args"][0]
    options += SERVER["args"][1:]
    known = {name for option in mlflow.cli.cli.commands[job].params for name in (*option.opts, *option.secondary_opts)}
    assert {option.partition("=")[0] for option in options} <= known
    settings = configparser.ConfigParser()
    settings.read_string(COMPOSE["configs"]["basic_auth"]["content"])
    [content] = [resource["data"]["basic_auth.ini"] for resource in MLFLOW if resource["kind"] == "ConfigMap"]
    assert content == COMPOSE["configs"]["basic_auth"]["content"]
    shipped = (Path(mlflow.__file__).parent / "server" / "auth" / "basic_auth.ini").read_text()
    assert settings["mlflow"].keys() <= set(re.findall(r"^(?:# )?(\w+) =", shipped, re.MULTILINE))


def test_the_mlflow_file_listens_on_loopback_and_holds_no_password() -> None:
    services = COMPOSE["services"]
    assert [port for each in services.values() for port in each.get("ports", ())] == ["127.0.0.1:5000:5000"]
    assert any(option.startswith("--allowed-hosts=") for option in services["mlflow"]["command"])
    secrets = {name for each in services.values() for name in each["secrets"]}
    assert secrets == COMPOSE["secrets"].keys()
    assert all(secret.keys() == {"environment"} for secret in COMPOSE["secrets"].values())
    address = next(option for option in services["mlflow"]["command"] if option.startswith("--backend-store-uri="))
    assert make_url(address.partition("=")[2]).password is None
    mounted = {volume.partition(":")[0] for each in services.values() for volume in each["volumes"]}
    assert mounted == COMPOSE["volumes"].keys()


def test_the_server_of_kubernetes_answers_to_the_name_that_configurations_say() -> None:
    [uri] = {
        load_config(file, [], LearnConfig).registry.uri for file in (ROOT / "jobs" / "configs").glob("internvl2_*.yaml")
    }
    service = next(r for r in MLFLOW if r["kind"] == "Service" and r["metadata"]["name"] == "mlflow")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert uri == f"http://{address}"
    [hosts] = [option.partition("=")[2].split(",") for option in SERVER["args"] if "--allowed-hosts" in option]
    assert address in hosts
    for host, answered in {
        "mlflow.team.svc:5000": True,
        "mlflow.evil.example:5000": False,
        "10.0.0.1:5000": False,
    }.items():
        assert any(fnmatchcase(host, pattern) for pattern in hosts) == answered, host


def test_the_server_of_kubernetes_holds_no_password_and_is_reached_from_ray_alone() -> None:
    secrets = [v for r in MLFLOW for v in _variables(r) if "PASSWORD" in v["name"] or "SECRET" in v["name"]]
    assert len(secrets) == 4
    assert {v["valueFrom"]["secretKeyRef"]["name"] for v in secrets} == {"pointsman-mlflow"}
    closed = {r["spec"]["podSelector"]["matchLabels"]["app"] for r in MLFLOW if r["kind"] == "NetworkPolicy"}
    assert closed == {"mlflow", "mlflow-postgresql"}


def _variables(resource: dict[str, Any]) -> list[dict[str, Any]]:
    template = resource.get("spec", {}).get("template", {"spec": {"containers": []}})
    return [variable for container in template["spec"]["containers"] for variable in container["env"]]


def test_images_hold_neither_history_nor_environments_nor_results() -> None:
    patterns = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "**/.venv", "**/runs", "**/mlruns"} <= set(patterns)
    assert {"**/.env", "**/.env.*"} <= set(patterns) & set(AWS["rsync_exclude"]), "what --env reads holds secrets"
    needed = ["pyproject.toml", "README.md", *(f"{p}/x.py" for p in ("pipeline", "jobs", "cluster", "tuning"))]
    assert not [path for path in needed for pattern in patterns if fnmatchcase(path, pattern.removeprefix("**/"))]
    assert "ENV POINTSMAN_COMMIT=$COMMIT" in DOCKERFILE
