"""What autoscalers may add, read from the files that this project ships and as Ray's own autoscaler reads them; no cluster."""

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.nodes import MOST_NODES, Node, kuberay_workers, workers_of

FILES = Path(__file__).resolve().parents[2] / "cluster"

UP = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}},
        "gpu": {"min_workers": 0, "max_workers": 4, "resources": {"CPU": 16, "GPU": 1}},
    },
}


@pytest.fixture
def ray_cluster() -> dict[str, Any]:
    """The RayCluster for interactive use, as the API server returns it."""
    resource = yaml.safe_load((FILES / "kubernetes" / "raycluster.yaml").read_text())
    resource["metadata"]["namespace"] = "default"
    return resource


def test_all_workers_together_are_no_more_than_the_cluster_allows() -> None:
    assert workers_of(UP) == [Node({"CPU": 16, "GPU": 1})] * 3


def test_the_file_of_ray_up() -> None:
    workers = workers_of(yaml.safe_load((FILES / "ray-cluster.yaml").read_text()))
    assert [(node.cpus, node.gpus) for node in workers] == [(16, 1)] * 4


def test_a_ray_cluster_with_autoscaling_may_get_all_replicas(ray_cluster) -> None:
    workers = kuberay_workers(ray_cluster)
    assert [(node.cpus, node.gpus) for node in workers] == [(12, 1)] * 12
    assert [node.labels["ray.io/market-type"] for node in workers] == ["spot"] * 8 + ["on-demand"] * 4


def test_without_autoscaling_it_gets_the_replicas_that_are_asked_for(ray_cluster) -> None:
    ray_cluster["spec"]["enableInTreeAutoscaling"] = False
    ray_cluster["spec"]["workerGroupSpecs"][1]["replicas"] = 2
    assert [node.labels for node in kuberay_workers(ray_cluster)] == [{"ray.io/market-type": "on-demand"}] * 2


def test_a_group_without_a_maximum_is_not_counted_for_ever(ray_cluster) -> None:
    for group in ray_cluster["spec"]["workerGroupSpecs"]:
        group["maxReplicas"] = 2**31 - 1  # what KubeRay fills in
    assert len(kuberay_workers(ray_cluster)) == 2 * MOST_NODES


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1, with its key in the same file."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "certificate.pem").write_bytes(
        made.public_bytes(pem) + key.private_bytes(pem, form, serialization.NoEncryption())
    )
    return tmp_path / "certificate.pem"


@pytest.fixture
def api_server(certificate: Path, ray_cluster: dict[str, Any]) -> Iterator[int]:
    """A server that gives the resource out under the address that Kubernetes' own has; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/apis/ray.io/v1/namespaces/default/rayclusters/pointsman"
            self.send_response(200 if found else 403)
            self.end_headers()
            self.wfile.write(json.dumps(ray_cluster).encode() if found else b"{}")

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("name", "found"), [("pointsman", "12"), ("not-mine", "None")])
def test_the_resource_is_read_where_this_pod_may(api_server: int, certificate: Path, name: str, found: str) -> None:
    """In a process of its own: Ray reads these variables when it is imported."""
    code = "from cluster.nodes import _kuberay; found = _kuberay(); print(found and len(found))"
    environment = os.environ | {
        "RAY_CLUSTER_NAME": name,
        "RAY_CLUSTER_NAMESPACE": "default",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(api_server),
        "RAY_KUBERAY_CA_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(certificate),
    }
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert answer.stdout.split() == [found], answer.stderr
