"""Each job in cluster/ reads only what one before it wrote, what the image holds, and what the user gives."""

import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft.config import recipe_yaml
from tests.support.manifests import CLUSTER, JOBS, SERVICE, Command, cluster_of, commands, container, groups, resources
from tests.support.paths import ROOT

GIVEN = {"/outputs/speech/manifest.jsonl", "/outputs/archive"}
"""What the user copies to the volume; cluster/README.md says so."""
HUB = re.compile(r"[\w.-]+/[\w.-]+")
INPUTS = ("sources", "audio_base", "text_base", "model", "projector", "adapters", "data", "audio")


def values(given: Any) -> Iterator[str]:
    """Yield the strings in the value of a key: `data` may be a mapping of sets, or a list of files and groups."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, dict):
        for one in given.values():
            yield from values(one)
    elif isinstance(given, list | tuple):
        for one in given:
            yield from values(one)


def read_paths(command: Command) -> set[str]:
    recipe = command.recipe.model_dump()
    return {path for key in INPUTS for path in values(recipe.get(key))}


def is_in_image(path: str) -> bool:
    """Tell whether the image has a match of a glob: it holds the checkout, without what .dockerignore names."""
    below = Path(path).relative_to("/opt/graft")
    left_out = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    return any(ROOT.glob(str(below))) and not any(fnmatch(below.parts[0], pattern) for pattern in left_out)


def missing(path: str, made: dict[str, Command | None]) -> bool:
    """Tell whether nobody has made a path; below a corpus lie the splits of its recipe."""
    if path.startswith("/opt/graft/"):
        return not is_in_image(path)
    if not path.startswith("/"):
        return path not in {"small", "bundled"} and not HUB.fullmatch(path)
    if path in made:
        return False
    folder, _, split = path.rpartition("/")
    maker = made.get(folder)
    return maker is None or maker.verb != "prepare" or split not in maker.recipe.model_dump()["splits"]


def follow_chain() -> Iterator[tuple[str, set[str], set[str], set[str]]]:
    """Yield what each manifest reads from the volume, writes to it, and misses, in the order of the guide."""
    made: dict[str, Command | None] = dict.fromkeys(GIVEN)
    for name in JOBS:
        read, written, missed = set[str](), set[str](), set[str]()
        for command in commands(name):
            paths = read_paths(command)
            missed |= {path for path in paths if missing(path, made)}
            read |= {path for path in paths if path.startswith("/outputs/") and not path.startswith(tuple(written))}
            if (out := command.recipe.model_dump()["out"]).startswith("/outputs/"):
                made[out] = command
                written.add(out)
        yield name, read, written, missed
    service = yaml.safe_load(resources(SERVICE)[0]["spec"]["serveConfigV2"])
    (application,) = service["applications"]
    (deployment,) = application["deployments"]
    read = {application["args"]["model"], deployment["user_config"]["model"]}
    yield SERVICE, read, set(), {path for path in read if missing(path, made)}


def test_every_manifest_reads_what_was_written_before_it() -> None:
    assert {name: missed for name, _, _, missed in follow_chain() if missed} == {}


def test_the_chain_covers_the_life_of_a_model() -> None:
    verbs = [command.verb for name in JOBS for command in commands(name)]
    assert verbs == ["transcribe", "prepare", "build", "stage1", "stage2", "merge", "evaluate", "transcribe"]


@pytest.mark.parametrize("name", [*JOBS[1:], SERVICE])
def test_the_comment_of_a_manifest_names_what_it_reads_and_writes(name: str) -> None:
    (read, written) = next((read, written) for other, read, written, _ in follow_chain() if other == name)
    text = (CLUSTER / name).read_text()
    for word, paths in (("reads", read), ("writes", written)):
        told = re.search(rf"^# {word} +(.+)$", text, re.MULTILINE)
        assert set(re.findall(r"/outputs/[\w./-]*\w", told[1] if told else "")) == paths


def test_the_guide_tells_how_to_give_what_no_manifest_makes() -> None:
    guide = (CLUSTER / "README.md").read_text()
    folders = {path.removesuffix("/manifest.jsonl") for path in GIVEN}
    assert set(re.findall(r"kubectl cp \S+ graft-files:(\S+)", guide)) == folders


@pytest.mark.parametrize("name", JOBS)
def test_jobs_mount_the_volume_that_they_use_and_the_try_needs_nothing(name: str) -> None:
    mounts = {
        mount["mountPath"] for group in groups(cluster_of(name)) for mount in container(group).get("volumeMounts", [])
    }
    uses_volume = any(read or written for other, read, written, _ in follow_chain() if other == name)
    assert mounts == ({"/outputs"} if uses_volume else set())
    if not uses_volume:
        text = (CLUSTER / name).read_text()
        assert not any(word in text for word in ("persistentVolumeClaim", "nvidia.com/gpu", "secretRef"))


@pytest.mark.parametrize(("fails", "code"), [("merge", 2), ("prepare", 2), ("", 0)])
def test_the_first_command_that_fails_ends_the_job_with_its_exit_code(fails: str, code: int, tmp_path: Path) -> None:
    """KubeRay writes the entrypoint into a script of bash, `ray job submit` quotes the words, and a shell runs them."""
    entrypoint = resources("train/rayjob.yaml")[0]["spec"]["entrypoint"]
    words = subprocess.run(
        ["bash", "-c", f"show() {{ printf '%s\\0' \"$@\"; }}; show {entrypoint} ;"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    program = tmp_path / "graft"
    program.write_text(f'#!/bin/sh\necho "$1"\n[ "$1" != "{fails}" ] || exit 2\n')
    program.chmod(0o755)
    found = subprocess.run(
        shlex.join(words),
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    verbs = [command.verb for command in commands("train/rayjob.yaml")]
    assert found.returncode == code
    assert found.stdout.split() == (verbs[: verbs.index(fails) + 1] if fails else verbs)


def test_values_need_no_quoting() -> None:
    for name in JOBS:
        for command in commands(name):
            assert all(re.fullmatch(r"[\w./,:*\[\]-]+", value) for value in command.overrides.values())


@pytest.mark.parametrize("verb", ["prepare", "build", "stage1", "stage2", "merge", "evaluate"])
def test_a_command_that_is_done_says_so_and_ends(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that is submitted again, or after a mistake was mended, goes on with what is left."""
    (command,) = (one for one in commands("train/rayjob.yaml") if one.verb == verb)
    recipe = command.recipe.model_copy(update={"out": str(tmp_path)})
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    (tmp_path / "result.json").write_text("{}")
    empty = {"overall": None, "sets": {}, "misfits": {"unknown": {}, "doubled": {}}, "settings": {}}
    report = empty | {"pipeline": "speech", "expected": [], "rtfx": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.iterdir())
    importlib.import_module(f"jobs.{verb}").run(recipe)
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed
    assert "done already" in printed or "already prepared" in printed
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.iterdir()) == before
