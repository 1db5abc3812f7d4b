"""cluster/ agrees with itself, with pyproject.toml and with the jobs. Nothing here builds the image or needs Kubernetes."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def dockerfile_lines(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} +(.+)$", DOCKERFILE, re.MULTILINE)


def test_rayjob_is_autoscaled_guarded_and_cleans_up(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"]["mode"] == "token"
    assert {group["groupName"] for group in cluster["workerGroupSpecs"]} == {"features", "gpu"}
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_entrypoint_names_a_job_and_a_recipe_that_exist(job: dict[str, Any]) -> None:
    python, m, module, recipe_flag, recipe, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, m, recipe_flag) == ("python", "-m", "--recipe")
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert (ROOT / recipe).is_file()
    assert overrides == [override for override in overrides if re.fullmatch(r"[\w.]+=[\w/.:\[\]-]+", override)]  # no quoting on the way


def test_entrypoint_is_a_whole_recipe(job: dict[str, Any]) -> None:
    from graft.config import read_recipe
    from jobs.stage1 import Stage1Recipe

    *_, recipe, model, data, out, workers, gpu = shlex.split(job["spec"]["entrypoint"])
    settings = read_recipe(Stage1Recipe, str(ROOT / recipe), [model, data, out, workers, gpu])
    assert settings.gpu
    mounts = {mount["mountPath"] for pod in pods(job) for container in pod["containers"] for mount in container["volumeMounts"]}
    assert isinstance(settings.data, str)
    assert all(path.startswith(tuple(f"{mount}/" for mount in mounts)) for path in (settings.model, settings.out, settings.data))


def test_ray_is_one_version_everywhere(job: dict[str, Any]) -> None:
    (ray_version,) = re.findall(r"^ARG RAY_VERSION=(.+)$", DOCKERFILE, re.MULTILINE)
    images = {container["image"] for pod in pods(job) for container in pod["containers"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray_version
    assert [image.rpartition("/")[2] for image in images] == [f"graft:{project['version']}-ray{ray_version}"]
    asked = [spec for extra in project["optional-dependencies"].values() for spec in extra if spec.startswith("ray[")]
    assert asked
    assert all(re.search(r"==(.+)$", spec)[1] == re.sub(r"\.\d+$", ".*", ray_version) for spec in asked)


def test_pods_get_what_they_ask_for_and_share_the_outputs(job: dict[str, Any]) -> None:
    claim = yaml.safe_load((ROOT / "cluster" / "outputs.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    resources = [job["spec"]["rayClusterSpec"]["autoscalerOptions"]["resources"]]
    for pod in pods(job):
        assert pod["restartPolicy"] == "Never"
        assert pod["securityContext"]["runAsNonRoot"] is True
        claimed = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert [claimed[mount["name"]] for mount in container["volumeMounts"]] == [claim["metadata"]["name"]]
        resources.append(container["resources"])
    for resource in resources:
        assert resource["requests"] == resource["limits"]
        assert {"cpu", "memory"} <= resource["limits"].keys()
    assert [resource["limits"].get("nvidia.com/gpu") for resource in resources] == [None, None, None, "1"]


def test_image_is_pinned_and_not_root(job: dict[str, Any]) -> None:
    (base,) = dockerfile_lines("FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    (user,) = dockerfile_lines("USER")
    assert int(user) == next(pods(job))["securityContext"]["runAsUser"] > 0
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE)
    assert set(installed.split(",")) == {"bundled", "train", "serve"} <= extras.keys()


def test_image_installs_dependencies_before_code() -> None:
    dependencies, code = DOCKERFILE.index('".[bundled'), DOCKERFILE.index("COPY . .")
    assert DOCKERFILE.index("COPY pyproject.toml .") < dependencies < code
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
