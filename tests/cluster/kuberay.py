"""What KubeRay 1.7's API reference says of its resources, as JSON schemas: the fields, their types, and what excludes what.

Written from https://docs.ray.io and KubeRay's API reference, for the fields that one writes by hand; a field that is not listed
is an error here, as `kubectl apply` would drop it. Pods inside are Kubernetes' own and are checked by its schemas.
"""

from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator

TEXT: dict[str, Any] = {"type": "string"}
FLAG: dict[str, Any] = {"type": "boolean"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
SECONDS: dict[str, Any] = {"type": "integer", "minimum": 1}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}
ANY: dict[str, Any] = {"type": "object"}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def fields(required: tuple[str, ...] = (), /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


CREDENTIAL = fields(value=TEXT, valueFrom=ANY)

CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    suspend=FLAG,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        resources=ANY,
        image=TEXT,
        imagePullPolicy=TEXT,
        env={"type": "array"},
    ),
    gcsFaultToleranceOptions=fields(
        backend=one_of("redis", "rocksdb"),
        redisAddress=TEXT,
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
        externalStorageNamespace=TEXT,
        storage=ANY,
    ),
    headGroupSpec=fields(
        ("rayStartParams", "template"),
        rayStartParams=TEXTS,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=FLAG,
        resources=TEXTS,
        labels=TEXTS,
        template=ANY,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            priority={"type": "integer"},
            resources=TEXTS,
            labels=TEXTS,
            rayStartParams=TEXTS,
            template=ANY,
        ),
    },
)

ENDS = one_of("SUCCEEDED", "FAILED")

RULE = fields(
    ("policy", "condition"),
    policy=one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
    condition={
        **fields(jobStatus=ENDS, jobDeploymentStatus=one_of("Failed"), ttlSeconds=COUNT),
        "oneOf": [{"required": ["jobStatus"]}, {"required": ["jobDeploymentStatus"]}],
    },
)

JOB = {
    **fields(
        entrypoint=TEXT,
        rayClusterSpec=CLUSTER,
        clusterSelector=TEXTS,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterPodTemplate=ANY,
        submitterConfig=fields(backoffLimit=COUNT),
        runtimeEnvYAML=TEXT,
        metadata=TEXTS,
        jobId=TEXT,
        backoffLimit=COUNT,
        preRunningDeadlineSeconds=SECONDS,
        activeDeadlineSeconds=SECONDS,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        deletionStrategy=fields(("deletionRules",), deletionRules={"type": "array", "minItems": 1, "items": RULE}),
        suspend=FLAG,
        managedBy=TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=TEXT,
    ),
    "allOf": [
        # Rules exclude the older way of cleaning up, and that one's time needs it.
        {
            "if": {"required": ["deletionStrategy"]},
            "then": {"not": {"anyOf": [{"required": ["shutdownAfterJobFinishes"]}, {"required": ["ttlSecondsAfterFinished"]}]}},
        },
        {"if": {"required": ["ttlSecondsAfterFinished"]}, "then": {"required": ["shutdownAfterJobFinishes"]}},
    ],
}  # fmt: skip

SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": JOB,
    "RayCronJob": fields(
        ("schedule", "jobTemplate"),
        schedule={"type": "string", "pattern": r"^\S+( \S+){4}$"},
        timeZone={"type": "string", "minLength": 1},
        suspend=FLAG,
        jobTemplate=JOB,
    ),
}
"""Schema of `spec` by kind."""


def validate(resource: dict[str, Any]) -> None:
    """Raises jsonschema's ValidationError where a resource of KubeRay is not as the reference says."""
    schema = fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": resource["kind"]},
        metadata={**fields(("name",), name=TEXT, labels=TEXTS, annotations=TEXTS)},
        spec=SPECS[resource["kind"]],
    )
    Draft202012Validator(schema).validate(resource)


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    """Returns the specification of the cluster inside a resource."""
    spec = resource["spec"]
    return spec.get("jobTemplate", spec).get("rayClusterSpec", spec)


def pods_of(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the pods of a resource as Kubernetes' own resources: the head's first."""
    cluster = cluster_of(resource)
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())):
        template = group["template"]
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
