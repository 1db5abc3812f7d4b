"""The manifests in cluster/ fit the schemas of Kubernetes, KubeRay and Ray, the jobs, and each other."""

import importlib
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.kuberay import CLUSTER_KEYS, mistakes, pods, ray_cluster
from tests.support.manifests import (
    CLUSTER,
    FOLDERS,
    JOBS,
    MANIFESTS,
    SERVICE,
    cluster_of,
    commands,
    container,
    groups,
    kubectl,
    resources,
)
from tests.support.pod_security import violations

KUBERNETES = ["1.30", "1.37"]
GPU, SPOT = "nvidia.com/gpu", {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
AUTOSCALED = ["train/rayjob.yaml", "transcribe/rayjob.yaml", SERVICE]
OTHER_SCHEMAS = {"PodMonitor", "PrometheusRule"}
"""Kinds whose schema no package has."""


@pytest.fixture(params=[*JOBS, SERVICE])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return cluster_of(request.param)


@pytest.fixture(params=AUTOSCALED)
def autoscaled(request: pytest.FixtureRequest) -> dict[str, Any]:
    return cluster_of(request.param)


def pod_specs(name: str) -> list[tuple[str, dict[str, Any]]]:
    """List all pods of a manifest as they are created, with their names."""
    found = []
    for resource in resources(name):
        if resource["kind"] in CLUSTER_KEYS:
            found += pods(resource)
        elif resource["kind"] == "Pod":
            found.append((resource["metadata"]["name"], resource["spec"]))
    return found


def test_the_folders_hold_these_manifests() -> None:
    assert set(MANIFESTS) >= {
        *JOBS,
        SERVICE,
        "setup/storage.yaml",
        "setup/namespace.yaml",
        "monitoring/podmonitor.yaml",
        "monitoring/alerts.yaml",
    }
    assert {path.parent.name for path in CLUSTER.glob("*/kustomization.yaml")} == {*FOLDERS, "common"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas_of_kubernetes_and_kuberay(name: str) -> None:
    for resource in resources(name):
        if resource["kind"] in CLUSTER_KEYS:
            assert mistakes(resource) == []
            assert re.fullmatch(
                r"[a-z][-a-z0-9]{0,40}", resource["metadata"]["name"]
            )  # KubeRay makes longer names of it
        elif resource["kind"] not in OTHER_SCHEMAS:
            for version in KUBERNETES:
                kubernetes_validate.validate(resource, version, strict=True)
    for pod_name, spec in pod_specs(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod_name}, "spec": spec}
        for version in KUBERNETES:
            kubernetes_validate.validate(pod, version, strict=True)


def test_unknown_fields_and_values_are_refused() -> None:
    (job,) = resources("train/rayjob.yaml")

    def changed(path: str, value: object) -> list[str]:
        copy = deepcopy(job)
        *parents, last = path.split(".")
        inner = copy
        for key in parents:
            inner = inner[key]
        inner[last] = value
        return mistakes(copy)

    assert "shutdownAfterJobFinished" in changed("spec.shutdownAfterJobFinished", True)[0]
    assert "spec.backoffLimit" in changed("spec.backoffLimit", "0")[0]
    assert "V2" in changed("spec.rayClusterSpec.autoscalerOptions.version", "V2")[0]
    assert "toleration" in changed("spec.rayClusterSpec.headGroupSpec.template.spec.toleration", [])[0]
    assert "hostnetwork" in changed("spec.submitterPodTemplate.spec.hostnetwork", False)[0]
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert "template" in mistakes(job)[0]


@pytest.mark.parametrize("registry", ["registry.example.com/graft", "ghcr.io/me/speech"])
def test_kubectl_renders_every_folder_with_the_registry_that_common_names(registry: str, tmp_path: Path) -> None:
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    common = tmp_path / "cluster" / "common" / "kustomization.yaml"
    common.write_text(common.read_text().replace("newName: registry.example.com/graft", f"newName: {registry}"))
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [f"cluster/{name}" for name in FOLDERS]}))
    rendered = list(yaml.safe_load_all(kubectl("kustomize", str(tmp_path))))
    named = {(one["kind"], one["metadata"]["name"]): one for one in rendered}
    (space,) = {one["metadata"].get("namespace") for one in rendered if one["kind"] != "Namespace"}
    assert ("Namespace", space) in named
    plain = [resource for name in MANIFESTS for resource in resources(name)]
    assert len(plain) == len(rendered)
    for resource in plain:
        # The plain files say the same, but for the namespace and the registry.
        found = named[resource["kind"], resource["metadata"]["name"]]
        text = yaml.safe_dump(found).replace(f"image: {registry}:", "image: registry.example.com/graft:")
        without = yaml.safe_load(text)
        without["metadata"].pop("namespace", None)
        assert without == resource
        assert yaml.safe_dump(found).count("image: ") == yaml.safe_dump(found).count(f"image: {registry}:")


def test_every_pod_passes_the_pod_security_standard_that_the_namespace_enforces() -> None:
    (namespace,) = resources("setup/namespace.yaml")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    found = {f"{name} {pod}": list(violations(spec)) for name in MANIFESTS for pod, spec in pod_specs(name)}
    assert len(found) == 1 + 2 + 2 * 4 + 3
    assert not {name: phrases for name, phrases in found.items() if phrases}


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v: hostPath"),
        ({"securityContext": {"runAsNonRoot": True}}, "submitter: seccompProfile is not RuntimeDefault"),
        ({"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}, "submitter: runAsNonRoot is not true"),
        ({"securityContext": {"runAsUser": 0}}, "pod: runAsUser is 0"),
        ({"containers": [{"name": "c"}]}, "c: allowPrivilegeEscalation is not false"),
        ({"initContainers": [{"name": "i", "securityContext": {"privileged": True}}]}, "i: privileged"),
        ({"containers": [{"name": "c", "securityContext": {"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}}]},
         "c: capabilities are added: SYS_PTRACE"),
        ({"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 1}]}]}, "c: hostPort"),
    ],
)  # fmt: skip
def test_pods_that_the_standard_forbids_are_found(change: dict[str, Any], phrase: str) -> None:
    (_, pod), *_ = pod_specs("train/rayjob.yaml")
    assert not list(violations(pod))
    assert phrase in violations(pod | change)


@pytest.mark.parametrize("missing", ["submitterPodTemplate", "autoscalerOptions"])
def test_what_kuberay_adds_by_itself_would_not_pass_the_standard(missing: str) -> None:
    (job,) = resources("train/rayjob.yaml")
    job["spec"].pop(missing, None)
    ray_cluster(job).pop(missing, None)
    assert [name for name, spec in pods(job) if list(violations(spec))] == [
        {"submitterPodTemplate": "submitter", "autoscalerOptions": "head"}[missing]
    ]


def test_rays_autoscaler_reads_the_groups(autoscaled: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "graft", "namespace": "default"}, "spec": autoscaled}
    )
    nodes = {name: node["resources"] for name, node in config["available_node_types"].items()}
    assert nodes.pop(config["head_node_type"])["CPU"] == 0  # only drivers and Serve's controller run there
    assert sum("GPU" in node for node in nodes.values()) == sum("GPU" not in node for node in nodes.values()) == 1
    assert all(node["CPU"] == 8 * node.get("GPU", 1) for node in nodes.values())


def test_clusters_need_a_token_and_are_autoscaled_within_bounds(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"]["mode"] == "token"
    for group in cluster.get("workerGroupSpecs", []):
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_request_the_memory_that_limits_them_and_no_rights_in_kubernetes(name: str) -> None:
    for pod, spec in pod_specs(name):
        for one in [*spec["containers"], *spec.get("initContainers", [])]:
            requested, limit = (one["resources"][key] for key in ("requests", "limits"))
            assert requested["memory"] == limit["memory"], pod
            assert {"cpu", "memory"} <= requested.keys() & limit.keys()
            assert requested.get(GPU) == limit.get(GPU)
        # The autoscaler, beside the head, uses the account that KubeRay makes for it.
        has_autoscaler = any(one["name"] == "autoscaler" for one in spec["containers"])
        assert spec.get("automountServiceAccountToken", True) is has_autoscaler
        assert spec["imagePullSecrets"] == [{"name": "graft-registry"}]


def test_pods_that_share_the_volume_have_probes_and_are_not_restarted(autoscaled: dict[str, Any]) -> None:
    claim, files = resources("setup/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in [files["spec"], *(group["template"]["spec"] for group in groups(autoscaled))]:
        (inside,) = pod["containers"]
        claimed = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        assert [claimed[mount["name"]] for mount in inside["volumeMounts"]] == [claim["metadata"]["name"]]
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]
        assert (
            pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        )  # else all files are visited at each start
    for group in groups(autoscaled):
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        for probe in ("livenessProbe", "readinessProbe"):
            assert "local_raylet_healthz" in container(group)[probe]["exec"]["command"][-1]


def test_gpu_pods_have_the_cuda_image_and_workers_tolerate_spot_nodes(autoscaled: dict[str, Any]) -> None:
    head, *workers = groups(autoscaled)
    assert "tolerations" not in head["template"]["spec"]
    for group in workers:
        tolerated = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        has_gpu = GPU in container(group)["resources"]["limits"]
        assert tolerated == SPOT | ({GPU} if has_gpu else set())
        assert container(group)["image"].endswith("-cuda" if has_gpu else "-cpu")


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_once_and_clean_up(name: str) -> None:
    (job,) = resources(name)
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] == 0  # a new cluster would repeat the user's mistake
    assert spec["submitterConfig"]["backoffLimit"] > 0  # a new head gets the job again
    (submitter,) = spec["submitterPodTemplate"]["spec"]["containers"]
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"
    assert "command" not in submitter  # KubeRay fills in its own
    assert submitter["image"] == container(cluster_of(name)["headGroupSpec"])["image"]


@pytest.mark.parametrize("name", JOBS[1:])
def test_the_gpus_suffice_for_the_commands(name: str) -> None:
    (gpu,) = (group for group in cluster_of(name)["workerGroupSpecs"] if group["groupName"] == "gpu")
    count = int(container(gpu)["resources"]["limits"][GPU]) * gpu["maxReplicas"]
    wanted = {
        command.verb: command.recipe.workers
        for command in commands(name)
        if getattr(command.recipe, "gpu", False) or getattr(command.recipe, "gpus_per_worker", 0)
    }
    assert wanted.keys() == ({"stage1", "stage2", "evaluate"} if name == "train/rayjob.yaml" else {"transcribe"})
    assert set(wanted.values()) == {count}


def test_the_head_has_memory_for_the_merge() -> None:
    """The merge holds all weights in float32, on the head."""
    from graft.training.estimate import count_parameters
    from jobs.build import planned_graft

    (build,) = (one for one in commands("train/rayjob.yaml") if one.verb == "build")
    config, _ = planned_graft(str(CLUSTER.parent / "jobs" / "recipes" / "fast-7b-build.yaml"))
    assert build.recipe.text_base == "Qwen/Qwen2-VL-7B-Instruct"
    memory = container(cluster_of("train/rayjob.yaml")["headGroupSpec"])["resources"]["limits"]["memory"]
    assert int(memory.removesuffix("Gi")) * 2**30 > 1.5 * 4 * count_parameters(config).total


def test_the_service_fits_ray_serves_schema_and_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import Engine
    from serve.config import ServeArgs

    service, *budgets = resources(SERVICE)
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    args = ServeArgs.model_validate(application.args)
    (engine,) = application.deployments
    assert (engine.name, engine.user_config) == (Engine.__name__, {"model": args.model})
    assert config.http_options.host == "0.0.0.0"

    _, ingress, gpu = groups(cluster_of(SERVICE))
    assert gpu["minReplicas"] >= args.min_replicas
    assert args.max_replicas <= gpu["maxReplicas"]
    for group in (ingress, gpu):  # a pod receives requests when its proxy answers
        assert (
            f"localhost:{config.http_options.port}/-/healthz"
            in container(group)["readinessProbe"]["exec"]["command"][-1]
        )

    labels = [group["template"]["metadata"]["labels"] for group in groups(cluster_of(SERVICE))]
    assert [budget["spec"]["selector"]["matchLabels"] for budget in budgets] == labels
    assert all(isinstance(budget["spec"]["minAvailable"], int) for budget in budgets)
    for group, budget in zip(
        (ingress, gpu), budgets[1:], strict=True
    ):  # else no node that runs such a pod could be drained
        assert group["minReplicas"] > budget["spec"]["minAvailable"]


def test_the_commented_fault_tolerance_fits_kuberay() -> None:
    text = (CLUSTER / SERVICE).read_text()
    (block,) = re.findall(r"^    # gcsFaultToleranceOptions:\n(?:    #   .+\n)+", text, re.MULTILINE)
    service = next(yaml.safe_load_all(text.replace(block, block.replace("    # ", "    "))))
    assert ray_cluster(service)["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert mistakes(service) == []


def test_the_network_policy_lets_in_what_the_documents_describe() -> None:
    (policy,) = resources("setup/network-policy.yaml")
    inside, metrics, service = policy["spec"]["ingress"]
    assert inside["from"][0] == {"podSelector": {}}
    assert metrics["ports"] == [{"port": 8080}]  # KubeRay's port "metrics"
    port = yaml.safe_load(resources(SERVICE)[0]["spec"]["serveConfigV2"])["http_options"]["port"]
    assert service["ports"] == [{"port": port}]
    guide = (CLUSTER / "README.md").read_text()
    for rule in (*inside["from"][1:], *metrics["from"], *service["from"]):
        (space,) = rule["namespaceSelector"]["matchLabels"].values()
        assert space in guide


def test_prometheus_is_told_of_kuberays_labels_and_port() -> None:
    (monitor,) = resources("monitoring/podmonitor.yaml")
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert expression == {"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"


def test_alerts_are_rules_that_prometheus_reads() -> None:
    (resource,) = resources("monitoring/alerts.yaml")
    (monitor,) = resources("monitoring/podmonitor.yaml")
    assert (resource["apiVersion"], resource["kind"]) == (monitor["apiVersion"], "PrometheusRule")
    assert resource["metadata"] == monitor["metadata"]  # the operator selects both by the same label
    (group,) = resource["spec"]["groups"]
    assert set(group) == {"name", "rules"}
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for rule in group["rules"]:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"Graft[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"[0-9]+[smh]", rule["for"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        kept = re.search(r"by \(([^)]*)\)", rule["expr"])  # the labels that the outermost aggregation keeps
        told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert kept
        assert told <= set(kept[1].split(", "))
        assert rule["expr"].count("(") == rule["expr"].count(")")
