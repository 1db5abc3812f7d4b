"""graft as pip installs it, from a wheel and from a checkout, beside a project that has packages jobs and serve."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs import COMMANDS
from tests.support import media, tiny_models
from tests.support.paths import ROOT

pytestmark = pytest.mark.processes

SOURCES = ("graft", "jobs", "serve", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
OURS = "raise ImportError('this is the package of the project, not of graft')\n"


@dataclass(frozen=True)
class Installation:
    """An environment with graft in it, which also sees the packages of this one, and a project that uses it."""

    environment: Path
    project: Path

    def run(self, *command: str, cwd: Path | None = None, code: int = 0) -> str:
        """Run a program of the environment in the project; returns what it prints, stderr after stdout."""
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        result = subprocess.run(
            [str(self.environment / "bin" / command[0]), *command[1:]],
            cwd=cwd or self.project,
            env=variables | {"PYTHONPATH": str(cwd or self.project), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    def run_all(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Run several programs at the same time; all must end with 0."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda command: self.run(*command), commands))


def install(home: Path, *options: str) -> Installation:
    """Install graft by pip's options into a new environment."""
    environment, project = home / "environment", home / "project"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [*PIP, "--python", str(environment), "install", "--no-deps", "--no-index", "--ignore-installed", *options],
        check=True,
    )
    for name in ("jobs", "serve"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(OURS)
    return Installation(environment, project)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a checkout is built from: setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    home = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", str(home), str(source)], check=True)
    (built,) = home.glob("graft_asr-*.whl")
    return install(home, str(built))


def test_a_wheel_puts_one_package_into_site_packages(wheel: Installation) -> None:
    (packages,) = wheel.environment.glob("lib/python*/site-packages")
    assert {path.name for path in packages.iterdir()} == {
        "graft",
        f"graft_asr-{version('graft-asr')}.dist-info",
        "others.pth",
    }
    installed = packages / "graft"
    for name in ("py.typed", "jobs/recipes/fast-7b-stage1.yaml", "jobs/data/prompts/train.jsonl", "serve/serve.yaml"):
        assert (installed / name).is_file(), name
    for package in ("graft", "jobs", "serve"):
        inside = installed if package == "graft" else installed / package
        modules = {path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py")}
        assert not {str(path) for path in modules if not (inside / path).is_file()}


def test_the_command_of_a_wheel_works_beside_packages_of_the_same_names(wheel: Installation) -> None:
    told, listed, explained, imported, served = wheel.run_all(
        [
            ("graft", "--version"),
            ("graft",),
            ("graft", "prepare", "--help"),
            ("python", "-c", "import graft; print(graft.__version__, graft.__file__)"),
            ("graft", "serve", "--help"),
        ]
    )
    assert told == f"graft {version('graft-asr')}\n"
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == [
        command for group in COMMANDS.values() for command in group
    ]
    assert explained.startswith("usage: graft prepare [--recipe NAME] [key=value ...]")
    assert imported.startswith(f"{version('graft-asr')} {wheel.environment}")
    assert "port = 8000" in served
    error = wheel.run("graft", "stage1", "--recipe", "fast-7b-stage", code=2)
    assert error.startswith(
        "graft: error: recipe fast-7b-stage: no such file; recipes of graft for stage1 are fast-7b-"
    )
    error = wheel.run("graft", "transcribe", "nowhere.flac", code=2)
    assert error == "graft: error: no such file or folder: audio=nowhere.flac\n"
    extra = wheel.run("python", "-c", "from graft.errors import require; require('no_such', extra='vllm')", code=1)
    assert "pip install 'graft-asr[vllm]'" in extra


@pytest.fixture(scope="module")
def checkout(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return install(tmp_path_factory.mktemp("checkout"), "--no-build-isolation", "-e", str(source))


def test_a_checkout_that_pip_knows_runs_both_as_a_command_and_by_its_modules(
    checkout: Installation, source: Path
) -> None:
    assert checkout.run("graft", "--version") == f"graft {version('graft-asr')}\n"
    assert checkout.run("graft", "merge", "--help").startswith("usage: graft merge")
    assert checkout.run("python", "-m", "jobs.merge", "--help", cwd=source).startswith("usage: graft merge")
    extra = checkout.run("python", "-c", "from graft.errors import require; require('no_such', extra='vllm')", code=1)
    assert f"pip install -e '{source}[vllm]'" in extra
    where = "import serve.config, graft.serve.config; print(serve.config.__file__, graft.serve.config.__file__)"
    assert checkout.run("python", "-c", where, cwd=source) == f"{source}/serve/config.py {source}/serve/config.py\n"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("kind", ["wheel", "checkout"])
def test_the_command_works_with_ray(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    installation = request.getfixturevalue(kind)
    graft = tiny_models.save_tiny_graft(tmp_path / "tiny")
    (tmp_path / "calls").mkdir()
    shutil.copy(media.SHORTEST_FIRST[0], tmp_path / "calls" / "a.flac")
    printed = installation.run("graft", "transcribe", str(tmp_path / "calls"), f"model={graft}", f"out={tmp_path}/out")
    assert "1 recording done, 0 failed" in printed
    assert (tmp_path / "out" / "files" / "a.flac.txt").is_file()


@pytest.mark.slow
def test_an_importer_sees_the_types(wheel: Installation) -> None:
    script = wheel.project / "importer.py"
    script.write_text(
        "import graft\n"
        "from graft.jobs.transcribe import TranscribeRecipe\n"
        'reveal_type(graft.load("small").transcribe("a.flac").text)\n'
        'reveal_type(TranscribeRecipe(audio="a.flac").strict)\n'
        "graft.load(5)\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(wheel.environment / "bin" / "python")]
    options = ["--follow-imports=silent", "--cache-dir", str(wheel.project / "cache"), str(script)]
    result = subprocess.run([*command, *options], cwd=wheel.project, capture_output=True, text=True)
    lines = [line.partition(": ")[2] for line in result.stdout.splitlines()]
    assert lines[:2] == ['note: Revealed type is "str"', 'note: Revealed type is "bool"']
    assert lines[2].startswith('error: Argument 1 to "open_transcriber" has incompatible type "int"')
    assert "Found 1 error" in result.stdout
