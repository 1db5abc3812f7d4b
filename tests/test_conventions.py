"""The files that other tools read: the workflow, compose.yaml, CITATION.cff, the examples and the changelog."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT
from tests.test_documents import check

WORKFLOW, COMPOSE, CITATION = ".github/workflows/ci.yml", "compose.yaml", "CITATION.cff"
SCHEMAS = {WORKFLOW: "github-workflows", COMPOSE: "compose-spec", CITATION: "citation-file-format"}
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_files_follow_their_schemas(name: str, schema: str) -> None:
    main = pytest.importorskip("check_jsonschema").main
    from click.testing import CliRunner

    result = CliRunner().invoke(main, ["--builtin-schema", f"vendor.{schema}", str(ROOT / name)])
    assert result.exit_code == 0, result.output


def test_the_workflow_runs_the_steps_of_ci() -> None:
    here = [line for line in (ROOT / ".ci/run").read_text().splitlines() if re.match(r"make |.*check_demo", line)]
    (job,) = read(WORKFLOW)["jobs"].values()
    there = [step["run"] for step in job["steps"] if "run" in step]
    assert there == [line.replace('"${PYTHON:-python3}"', "python3") for line in here]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert project["requires-python"] == f">={version}"


def test_compose_runs_the_service() -> None:
    (service,) = read(COMPOSE)["services"].values()
    command = shlex.join(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"])
    assert "model=small" in command
    check(shlex.split(command))
    dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
    assert re.search(rf"^FROM .* AS {service['build']['target']}$", dockerfile, re.MULTILINE)
    assert f"--target {service['build']['target']} -t {service['image']} ." in dockerfile
    assert [port.split(":")[0] for port in service["ports"]] == ["127.0.0.1"]
    assert "wget" in dockerfile
    assert service["healthcheck"]["test"][-1].endswith("/readyz")
    assert ":?" in service["environment"]["GRAFT_API_KEYS"]  # compose refuses to start without keys


def test_the_version_is_said_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert str(read(CITATION)["version"]) == version
    released = re.findall(r"^## (\d\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version


@pytest.mark.processes
@pytest.mark.parametrize(("wer", "fault"), [(0.02, ""), (0.4, "WER on the trained clips is 40.0%, not under 10 %")])
def test_the_demos_numbers_are_checked(tmp_path: Path, wer: float, fault: str) -> None:
    losses = "{loss_first: 0.2, loss_last: 0.1, seconds: 9}"
    rates = "unseen: 0.1, swapped: 1.2, unseen_as_it_comes: 0.1, whisper_trained: 0, whisper_unseen: 0"
    summary = yaml.safe_load(
        f"{{stage1: {losses}, stage2: {losses}, wer: {{trained: {wer}, {rates}}}, clips: {{trained: 64, unseen: 20}},"
        " seconds: {total: 400}, rtfx: 4}"
    )
    (tmp_path / "summary.json").write_text(str(summary).replace("'", '"'))
    command = [sys.executable, ROOT / ".ci/check_demo.py", tmp_path / "summary.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) is not bool(fault)
    assert fault in result.stderr


@pytest.mark.slow
@pytest.mark.bundled
@pytest.mark.processes
def test_the_notebook_runs_and_says_what_it_shows() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    run = nbclient.execute(nbformat.from_dict(shown), cwd=NOTEBOOK.parent, timeout=240)
    assert outputs(run) == outputs(shown)


def outputs(notebook: Any) -> list[str]:
    """Return the text that each code cell prints. Besides it, only tqdm may ask for widgets."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(part.name == "stdout" or "TqdmWarning" in part.text for cell in cells for part in cell.outputs)
    return ["".join(part.text for part in cell.outputs if part.name == "stdout") for cell in cells]
