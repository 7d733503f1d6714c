"""The manifests agree with one another, with the configuration they run, and with Ray's own schema."""

import configparser
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import mlflow.cli
import pytest
import ray
import yaml
from sqlalchemy import make_url

from pipeline.config import LearnConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = load_config(ROOT / "jobs" / "configs" / "internvl2_2b.yaml", [], LearnConfig)
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
AWS = yaml.safe_load((ROOT / "cluster" / "ray-cluster.yaml").read_text())
CLAIM, JOB = yaml.safe_load_all((ROOT / "cluster" / "kuberay-rayjob.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
COMPOSE = yaml.safe_load((ROOT / "cluster" / "mlflow-compose.yaml").read_text())
PODS = [CLUSTER["headGroupSpec"]["template"]["spec"], CLUSTER["workerGroupSpecs"][0]["template"]["spec"]]


def test_image_is_the_same_everywhere_and_has_the_installed_ray() -> None:
    image = re.search(r"docker build .* -t (\S+) ", DOCKERFILE)
    assert image is not None
    assert {pod["containers"][0]["image"] for pod in PODS} == {image[1]} == {AWS["docker"]["image"]}
    assert f"FROM rayproject/ray:{ray.__version__}-py311-gpu" in DOCKERFILE
    assert CLUSTER["rayVersion"] == ray.__version__


def test_entrypoint_exists_and_starts_in_the_images_folder() -> None:
    python, flag, module, config = JOB["spec"]["entrypoint"].split()
    assert (python, flag) == ("python", "-m")
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert load_config(ROOT / config, [], LearnConfig) == CONFIG
    folder = re.search(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)
    assert folder is not None
    assert {pod["containers"][0]["workingDir"] for pod in PODS} == {folder[1]}
    assert folder[1] in AWS["file_mounts"]


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


def test_kubernetes_has_the_gpus_and_cpus_of_the_configuration() -> None:
    [group] = CLUSTER["workerGroupSpecs"]
    limits = PODS[1]["containers"][0]["resources"]["limits"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == CONFIG.training.workers
    assert int(limits["cpu"]) > CONFIG.training.cpus_per_worker, "nothing left for Ray Data"


def test_rayjob_ends_with_its_job_and_is_retried() -> None:
    spec = JOB["spec"]
    assert (JOB["apiVersion"], JOB["kind"], CLAIM["kind"]) == ("ray.io/v1", "RayJob", "PersistentVolumeClaim")
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] > 0
    assert CLUSTER["authOptions"] == {"mode": "token"}


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
    assert f"mlflow[auth]=={mlflow.__version__}" in server["build"]["dockerfile_inline"]
    job, *options = server["command"]
    known = {name for option in mlflow.cli.cli.commands[job].params for name in (*option.opts, *option.secondary_opts)}
    assert {option.partition("=")[0] for option in options} <= known
    settings = configparser.ConfigParser()
    settings.read_string(COMPOSE["configs"]["basic_auth"]["content"])
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
