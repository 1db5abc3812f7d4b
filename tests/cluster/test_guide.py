"""cluster/README.md holds what --plan prints, and commands and conditions that kubectl and KubeRay know."""

import re
import shlex
from typing import Any

import pytest

from jobs import stage1, stage2
from jobs.common.cli import run_job
from tests.support.documents import Page
from tests.support.kuberay import VERSIONS, schema
from tests.support.manifests import MANIFESTS, kubectl, resources
from tests.support.paths import ROOT

GUIDE = (ROOT / "cluster" / "README.md").read_text()
ROW = re.compile(
    r"^\| (?P<recipe>[\w-]+), stage (?P<stage>\d)(?P<nf4> \(NF4\))?(?:, `(?P<key>[\w=]+)`)? "
    r"\| (?P<workers>\d+) (?:RTX )?(?P<device>\w+) "
    r"\| (?P<gb>\d+) \| (?P<samples_per_s>[\d,]+) \| (?P<hours>[\d.]+) \| (?P<device_hours>[\d.]+) \|$",
    re.MULTILINE,
)
ROWS = list(ROW.finditer(GUIDE))
JOBS: dict[str, tuple[Any, Any]] = {"1": (stage1, stage1.Stage1Recipe), "2": (stage2, stage2.Stage2Recipe)}


def test_every_row_of_the_table_is_read() -> None:
    (block,) = re.findall(r"^\| recipe \| devices \|.*\n\|[-|]+\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    assert len(ROWS) == block.count("\n") >= 6


@pytest.mark.parametrize("row", ROWS, ids=[" ".join(row.group("recipe", "stage", "workers", "device")) for row in ROWS])
def test_a_row_of_the_sizing_table_is_what_plan_prints(row: re.Match[str], capsys: pytest.CaptureFixture[str]) -> None:
    job, recipe_class = JOBS[row["stage"]]
    recipe = ROOT / "jobs" / "recipes" / f"{row['recipe']}-stage{row['stage']}.yaml"
    argv = [
        "--recipe",
        str(recipe),
        f"model={row['recipe']}",
        f"workers={row['workers']}",
        *([row["key"]] if row["key"] else []),
    ]
    plan = ["--plan", "--device", row["device"].lower(), "--hours", "2500"]
    assert run_job(recipe_class, job.run, summary="", argv=[*argv, *plan], plan=job.plan) == 0
    output = capsys.readouterr().out
    found = [
        re.search(pattern, output, re.MULTILINE)
        for pattern in (
            r"^speed +([\d,.]+) samples/s",
            r"^time +([\d.,]+) h, ([\d.,]+) device",
            r"([\d.]+)  <- this recipe$",
        )
    ]
    (rate,), (hours, device_hours), (memory,) = (
        [float(number.replace(",", "")) for number in one.groups()] for one in found if one
    )
    assert float(row["samples_per_s"].replace(",", "")) == pytest.approx(rate, abs=0.5)
    assert float(row["hours"]) == pytest.approx(hours, abs=0.051)
    assert float(row["device_hours"]) == pytest.approx(device_hours, abs=0.051)
    assert float(row["gb"]) == pytest.approx(memory, abs=0.5)
    assert (", NF4" in output) == bool(row["nf4"])
    assert "1 (assumed: 10 s a clip" in output
    assert "at 45% of" in output


NETWORK_ROW = re.compile(
    r"^\| (?P<recipe>[\w-]+), stage (?P<stage>\d)(?: \(NF4\))? \| (?P<layout>ddp|zero \d) "
    r"\|(?P<numbers>(?: [\d.]+ \|)+)$",
    re.MULTILINE,
)


def test_the_table_of_the_network_holds_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (head,) = re.findall(r"^\| recipe \| layout \| GB \|(.+)\|$", GUIDE, re.MULTILINE)
    rows = list(NETWORK_ROW.finditer(GUIDE))
    assert len(rows) == 3
    for row in rows:
        job, recipe_class = JOBS[row["stage"]]
        recipe = ROOT / "jobs" / "recipes" / f"{row['recipe']}-stage{row['stage']}.yaml"
        argv = ["--recipe", str(recipe), f"model={row['recipe']}", "workers=8", "--plan", "--device", "h100"]
        assert run_job(recipe_class, job.run, summary="", argv=argv, plan=job.plan) == 0
        output = capsys.readouterr().out
        heading, *lines = output[output.index("network ") :].splitlines()[1:]
        assert [name.strip() for name in head.split("|")] == re.split(r" {2,}", heading.strip())[1:]
        (printed,) = (line.split(row["layout"])[1].split() for line in lines if line.strip().startswith(row["layout"]))
        told = row["numbers"].replace("|", " ").split()
        assert told == printed[: len(told)]
        step_s = re.search(r"a step has ([\d.]+) s of arithmetic", output)
        assert step_s
        assert float(step_s[1]) == pytest.approx(0.5, abs=0.05)


COMMANDS = Page("cluster/README.md").commands()
KUBECTL = [words[1:] for words in map(shlex.split, COMMANDS) if words[0] == "kubectl"]
CONDITIONS = {"rayservice": {"Ready", "UpgradeInProgress", "Suspended"}, "pod": {"Ready"}}
"""Types of conditions that KubeRay (1.3 and newer) and Kubernetes set."""


@pytest.mark.parametrize("arguments", KUBECTL, ids=shlex.join)
def test_kubectl_knows_each_command_and_its_options(arguments: list[str]) -> None:
    assert kubectl(*arguments, "--help")


def test_a_wrong_option_of_kubectl_is_found() -> None:
    with pytest.raises(AssertionError, match="unknown flag: --timout"):
        kubectl("wait", "--timout=10m", "rayjob/graft-try", "--help")


@pytest.mark.parametrize("arguments", [one for one in KUBECTL if one[0] == "wait"], ids=shlex.join)
def test_what_the_guide_waits_for_exists(arguments: list[str]) -> None:
    (target,) = (one for one in arguments[1:] if not one.startswith("-"))
    (reason,) = (one.removeprefix("--for=") for one in arguments if one.startswith("--for="))
    kind, _, name = target.partition("/")
    made = {(one["kind"].lower(), one["metadata"]["name"]) for path in MANIFESTS for one in resources(path)}
    assert ("rayjob" if kind == "job" else kind, name) in made  # KubeRay gives the submitter's job the RayJob's name
    if reason == "create":
        return
    if condition := re.fullmatch(r"condition=(\w+)", reason):
        assert condition[1] in CONDITIONS[kind]
        return
    (path, value) = re.fullmatch(r"jsonpath=\{\.([\w.]+)\}=(\w+)", reason).groups()
    for version in VERSIONS:
        node = schema({"rayjob": "RayJob", "rayservice": "RayService"}[kind], version)
        for key in path.split("."):
            node = node["properties"][key]
        assert value in node.get("enum", [value])
    assert (path, value) == ("status.jobStatus", "SUCCEEDED")
