"""KubeRay's custom resource definitions, and the pods that its operator makes of a resource.

kuberay-crds.json.xz holds the schemas (v1) of RayJob and RayService from the CRDs in the Helm charts of KubeRay 1.5.1,
1.6.2 and 1.7.0 (github.com/ray-project/kuberay, Apache-2.0), without their descriptions. `python -m
tests.support.kuberay CRD.yaml.gz ...` writes it anew from files called v1.7.0-rayjobs.yaml.gz.
"""

import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from tests.support.paths import ROOT

CRDS = ROOT / "tests" / "cluster" / "kuberay-crds.json.xz"
VERSIONS = ("1.5.1", "1.6.2", "1.7.0")
CLUSTER_KEYS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}

Json = dict[str, Any]


def mistakes(resource: Json) -> list[str]:
    """List what a version of KubeRay does not allow in a resource, unknown fields included: `1.7.0 path: message`."""
    return [
        f"{version} {error.json_path}: {error.message}"
        for version in VERSIONS
        for error in _validator(resource["kind"], version).iter_errors(resource)
    ]


def schema(kind: str, version: str) -> Json:
    """Return the schema of a kind as KubeRay has it."""
    return _schemas()[version][kind]


def ray_cluster(resource: Json) -> Json:
    """Return the Ray cluster of a RayJob or a RayService."""
    return resource["spec"][CLUSTER_KEYS[resource["kind"]]]


def pods(resource: Json) -> Iterator[tuple[str, Json]]:
    """Yield name and spec of the pods of a RayJob or a RayService, with the containers that the operator adds."""
    spec, cluster = resource["spec"], ray_cluster(resource)
    if resource["kind"] == "RayJob" and spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        (ray,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        default = {"restartPolicy": "Never", "containers": [{"name": "ray-job-submitter", "image": ray["image"]}]}
        yield "submitter", deepcopy(spec["submitterPodTemplate"]["spec"] if "submitterPodTemplate" in spec else default)
    head = deepcopy(cluster["headGroupSpec"]["template"]["spec"])
    if cluster.get("enableInTreeAutoscaling"):
        options = cluster.get("autoscalerOptions", {})
        given = {key: options[key] for key in ("securityContext", "resources") if key in options}
        head["containers"].append({"name": "autoscaler", "image": head["containers"][0]["image"], **given})
    yield "head", _with_shared_memory(head)
    for group in cluster.get("workerGroupSpecs", []):
        worker = deepcopy(group["template"]["spec"])
        copied = ("image", "imagePullPolicy", "securityContext", "env", "volumeMounts")
        waiting = {key: value for key, value in worker["containers"][0].items() if key in copied}
        small = {"cpu": "200m", "memory": "256Mi"}
        resources = {"requests": small, "limits": small}
        worker.setdefault("initContainers", []).append({"name": "wait-gcs-ready", **waiting, "resources": resources})
        yield group["groupName"], _with_shared_memory(worker)


def _with_shared_memory(pod: Json) -> Json:
    """Add /dev/shm, which the operator makes as large as the memory that the Ray container requests."""
    ray = pod["containers"][0]
    size = ray["resources"]["requests"]["memory"]
    pod.setdefault("volumes", []).append({"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    ray["volumeMounts"] = [*ray.get("volumeMounts", []), {"name": "shared-mem", "mountPath": "/dev/shm"}]
    return pod


@cache
def _schemas() -> Json:
    return json.loads(lzma.decompress(CRDS.read_bytes()))


@cache
def _validator(kind: str, version: str) -> Draft202012Validator:
    return Draft202012Validator(_strict(schema(kind, version)))


def _strict(node: Any) -> Any:
    """Refuse unknown fields, as `kubectl apply` does, and take null where the schema says nullable."""
    if isinstance(node, list):
        return [_strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    strict = {key: _strict(value) for key, value in node.items() if key != "properties"}
    if isinstance(node.get("properties"), dict):
        strict["properties"] = {name: _strict(value) for name, value in node["properties"].items()}
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            strict["additionalProperties"] = False
    if node.get("nullable") and isinstance(node.get("type"), str):
        strict["type"] = [node["type"], "null"]
    return strict


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_descriptions(one) for one in node]
    if not isinstance(node, dict):
        return node
    is_text = isinstance(node.get("description"), str)  # a field of that name is a mapping
    return {key: _without_descriptions(value) for key, value in node.items() if key != "description" or not is_text}


def write_subset(paths: list[Path]) -> None:
    """Write CRDS from the CRDs in gzipped files, named by their version."""
    schemas: dict[str, Json] = {}
    for path in sorted(paths):
        with gzip.open(path) as file:
            crd = yaml.safe_load(file)
        (stored,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
        kinds = schemas.setdefault(path.name.removeprefix("v").partition("-")[0], {})
        kinds[crd["spec"]["names"]["kind"]] = _without_descriptions(stored["schema"]["openAPIV3Schema"])
    CRDS.write_bytes(lzma.compress(json.dumps(schemas, separators=(",", ":")).encode(), preset=9))


if __name__ == "__main__":
    write_subset([Path(argument) for argument in sys.argv[1:]])
