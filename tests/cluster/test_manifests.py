"""The files in cluster/ fit the schemas of Kubernetes, KubeRay and Ray, pyproject.toml and the jobs."""

import importlib
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.kuberay import KINDS
from tests.support.paths import ROOT

CLUSTER = ROOT / "cluster"
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]
JOBS = ["rayjob-train.yaml", "rayjob-transcribe.yaml"]
MANIFESTS = [*JOBS, "rayservice.yaml", "outputs.yaml"]
KUBERNETES = ["1.30", "1.37"]
GPU, SPOT = "nvidia.com/gpu", {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}


def resources(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def ray_cluster(name: str) -> dict[str, Any]:
    spec = resources(name)[0]["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def groups(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


@pytest.fixture(params=[*JOBS, "rayservice.yaml"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ray_cluster(request.param)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas_of_kubernetes_and_kuberay(name: str, version: str) -> None:
    for resource in resources(name):
        if model := KINDS.get(resource["kind"]):
            model.model_validate(resource)
            for group in groups(ray_cluster(name)):
                template = {
                    "apiVersion": "v1",
                    "kind": "PodTemplate",
                    "metadata": {"name": "pod"},
                    "template": group["template"],
                }
                kubernetes_validate.validate(template, version, strict=True)
        else:
            kubernetes_validate.validate(resource, version, strict=True)


def test_unknown_fields_are_refused() -> None:
    job, template = (
        resources("rayjob-train.yaml")[0],
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}},
    )
    with pytest.raises(ValueError, match="shutdownAfterJobFinished"):
        KINDS["RayJob"].model_validate(job | {"spec": job["spec"] | {"shutdownAfterJobFinished": True}})
    pod = ray_cluster("rayjob-train.yaml")["headGroupSpec"]["template"]["spec"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            template | {"template": {"spec": pod | {"toleration": []}}}, KUBERNETES[0], strict=True
        )


def test_rays_autoscaler_reads_the_groups(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "graft", "namespace": "default"}, "spec": cluster}
    )
    nodes = {name: node["resources"] for name, node in config["available_node_types"].items()}
    assert nodes.pop(config["head_node_type"])["CPU"] == 0  # only drivers and Serve's controller run there
    assert sum("GPU" in node for node in nodes.values()) == sum("GPU" not in node for node in nodes.values()) == 1
    assert all(node["CPU"] == 8 for node in nodes.values())


def test_clusters_are_autoscaled_and_need_a_token(cluster: dict[str, Any]) -> None:
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"]["mode"] == "token"
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_pods_have_limits_probes_and_the_shared_volume(cluster: dict[str, Any]) -> None:
    (claim,) = resources("outputs.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups(cluster):
        pod, inside = group["template"]["spec"], container(group)
        assert pod["restartPolicy"] == "Never"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert inside["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        claimed = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        assert [claimed[mount["name"]] for mount in inside["volumeMounts"]] == [claim["metadata"]["name"]]
        assert inside["resources"]["requests"] == inside["resources"]["limits"]
        assert {"cpu", "memory"} <= inside["resources"]["limits"].keys()
        for probe in ("livenessProbe", "readinessProbe"):
            assert "local_raylet_healthz" in inside[probe]["exec"]["command"][-1]


def test_gpu_pods_have_the_cuda_image_and_workers_tolerate_spot_nodes(cluster: dict[str, Any]) -> None:
    head, *workers = groups(cluster)
    assert "tolerations" not in head["template"]["spec"]
    for group in workers:
        tolerated = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        has_gpu = container(group)["resources"]["limits"].get(GPU) == "1"
        assert tolerated == SPOT | ({GPU} if has_gpu else set())
        assert container(group)["image"].endswith("-cuda" if has_gpu else "-cpu")


@pytest.mark.parametrize("name", JOBS)
def test_jobs_clean_up_and_their_entrypoints_are_valid_recipes(name: str) -> None:
    from graft.config import models_in, read_recipe
    from jobs.common.cli import PlanOptions

    (job,) = resources(name)
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    python, m, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, m) == ("python", "-m")
    path = arguments.pop(arguments.index("--recipe") + 1) if "--recipe" in arguments else None
    overrides = [argument for argument in arguments if argument != "--recipe"]
    assert all(
        re.fullmatch(r"[\w.]+=[\w/.:,\[\]-]+", override) for override in overrides
    )  # values that need no quoting
    verb = importlib.import_module(module)
    (recipe_class,) = {one for one in models_in(verb.run.__annotations__["recipe"]) if one is not PlanOptions}
    recipe = read_recipe(recipe_class, str(ROOT / path) if path else None, overrides)
    assert recipe.gpu if module == "jobs.stage1" else recipe.gpus_per_worker == 1
    gpus = next(group for group in ray_cluster(name)["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert recipe.workers <= gpus["maxReplicas"]
    mounts = tuple(
        f"{mount['mountPath']}/" for group in groups(ray_cluster(name)) for mount in container(group)["volumeMounts"]
    )
    given = dict(override.split("=") for override in overrides)
    assert all(given[key].startswith(mounts) for key in ("model", "data", "audio", "out") if key in given)


def test_the_service_fits_ray_serves_schema_and_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import Engine
    from serve.config import ServeArgs

    service, *budgets = resources("rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, builder = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    args = ServeArgs.model_validate(application.args)
    (engine,) = application.deployments
    assert (engine.name, engine.user_config) == (Engine.__name__, {"model": args.model})
    assert config.http_options.host == "0.0.0.0"

    _, ingress, gpu = groups(ray_cluster("rayservice.yaml"))
    assert gpu["minReplicas"] >= args.min_replicas
    assert args.max_replicas <= gpu["maxReplicas"]
    for group in (ingress, gpu):  # a pod receives requests when its proxy answers
        assert (
            f"localhost:{config.http_options.port}/-/healthz"
            in container(group)["readinessProbe"]["exec"]["command"][-1]
        )
    variables = {variable["name"]: variable["value"] for variable in container(ingress)["env"]}
    module, _, middlewares = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert getattr(importlib.import_module(module), middlewares)()

    labels = [group["template"]["metadata"]["labels"] for group in groups(ray_cluster("rayservice.yaml"))]
    assert [budget["spec"]["selector"]["matchLabels"] for budget in budgets] == labels
    assert all(isinstance(budget["spec"]["minAvailable"], int) for budget in budgets)
    for group, budget in zip(
        (ingress, gpu), budgets[1:], strict=True
    ):  # else no node that runs such a pod could be drained
        assert group["minReplicas"] > budget["spec"]["minAvailable"]


def test_ray_up_accepts_the_configuration() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import cli

    config = prepare_config(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text()))
    validate_config(config)
    assert config["available_node_types"]["local.cluster.node"]["max_workers"] == len(config["provider"]["worker_ips"])
    assert config["auth"]["ssh_private_key"]  # Ray copies it to the head, which reaches the workers with it
    assert {"openssh-client", "rsync"} <= set(DOCKERFILE.split())
    assert {"--env=RAY_AUTH_MODE=token", "--env=NVIDIA_VISIBLE_DEVICES=all"} <= set(config["docker"]["run_options"])
    (path,) = re.findall("--env=RAY_AUTH_TOKEN_PATH=(.+)", "\n".join(config["docker"]["run_options"]))
    assert path in config["file_mounts"]
    starts = [
        line.rpartition(";")[2]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in config[key]
    ]
    for line in starts:
        ray, command, *options = shlex.split(line)
        assert ray == "ray"
        cli.commands[command].make_context(command, options)  # raises for unknown options


def test_ray_and_graft_have_the_same_version_everywhere() -> None:
    pinned = dict(
        line.split("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    tag = f"graft:{PROJECT['version']}-ray{pinned['ray']}"
    images = [container(group)["image"] for name in (*JOBS, "rayservice.yaml") for group in groups(ray_cluster(name))]
    images.append(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())["docker"]["image"])
    assert {image.rpartition("/")[2] for image in images} == {f"{tag}-cpu", f"{tag}-cuda"}
    assert {ray_cluster(name)["rayVersion"] for name in (*JOBS, "rayservice.yaml")} == {pinned["ray"]}
    assert set(re.findall(r"graft:[\w.-]+", DOCKERFILE)) == {f"{tag}-cpu", f"{tag}-cuda"}

    requested = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in image_extras())]
    for requirement in map(Requirement, (line for lines in requested for line in lines)):
        if requirement.name != NAME:
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_all_packages_of_the_image_are_pinned_to_matching_versions() -> None:
    """Dependencies of dependencies are followed as far as the pinned versions are installed here."""
    if sys.platform != "linux" or sys.version_info[:2] != (3, 11):
        pytest.skip("the image has Python 3.11 on Linux, which asks for other packages")
    pinned = dict(
        line.split("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    for requirement in required(NAME, frozenset(image_extras()), pinned, set()):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} is not pinned"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement}, not {pinned[name]}"


PackageAndExtras = tuple[str, frozenset[str]]


def required(
    package: str, extras: frozenset[str], pinned: dict[str, str], seen: set[PackageAndExtras]
) -> Iterator[Requirement]:
    """Yield the requirements of a package with these extras, recursively; torch pins its own requirements itself."""
    if (package, extras) in seen or package == "torch" or version(package) != pinned.get(package, version(package)):
        return
    seen.add((package, extras))
    for requirement in map(Requirement, requires(package) or []):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            if requirement.name != NAME:
                yield requirement
            yield from required(canonicalize_name(requirement.name), frozenset(requirement.extras), pinned, seen)


def image_extras() -> set[str]:
    """Return the extras that the image installs, and those that these include."""
    (installed,) = set(re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE))
    extras = set(installed.split(","))
    assert extras == {"bundled", "train", "serve"}
    for extra in list(extras):
        extras |= {
            one
            for line in PROJECT["optional-dependencies"][extra]
            if line.startswith(f"{NAME}[")
            for one in Requirement(line).extras
        }
    return extras


def test_images_are_pinned_do_not_run_as_root_and_copy_code_last() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    base, names = stages[1].splitlines()[0], re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+ AS system", base)
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+$", stages[0], re.MULTILINE)
    assert names == ["system", "cpu-packages", "cuda-packages", "cpu", "cuda"]
    for packages in stages[2:4]:
        assert "--constraint constraints.txt" in packages
        (user,) = re.findall(r"^USER (\d+)$", packages, re.MULTILINE)
        assert (
            int(user) == ray_cluster(JOBS[0])["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] > 0
        )
    for code in stages[4:]:
        assert re.findall(r"^(\w+) ", code.partition("\n")[2], re.MULTILINE) == ["COPY", "ENV"]
    assert {".git", ".venv", "runs"} <= set((ROOT / ".dockerignore").read_text().split())


def test_hadolint_has_no_complaints() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("hadolint has no package for this machine")
    found = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(CLUSTER / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "")
