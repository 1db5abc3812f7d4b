"""Imports run one way: jobs -> graft, serve -> graft. Ray and HTTP stay at the edge, optional packages in one file each."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = sorted(
    path.relative_to(ROOT) for folder in ("graft", "jobs", "serve") for path in (ROOT / folder).rglob("*.py")
)
EDGE = {"ray", "fastapi", "starlette", "uvicorn"}
OPTIONAL = ("deepspeed", "peft", "bitsandbytes", "vllm")
REMOTE_CODE = ("configuration", "audio", "projector", "modeling")

# In graft, a module imports only from rows above its own.
ORDER = (
    {"errors", "transcript"},
    {"config", "audio", "model.configuration"},
    {"speech", "prompts"},
    {"chunking", "features", "wording", "formatting", "guards"},
    {"processor"},
    {"transcriber"},
)


def imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Modules that a file imports, local imports and `require("...")` among them unless only those at its top level are asked for."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                yield str(module)
                yield from (
                    f"{module}.{name.name}" for name in names if module in ("graft", "graft.model", "jobs", "serve")
                )
            case ast.ImportFrom(module=module, level=level):
                yield ".".join([*path.parts[:-level], *([module] if module else [])])
            case ast.Call(func=ast.Name(id="require"), args=[ast.Constant(value=str(module)), *_]):
                yield module


def packages(path: Path, *, everywhere: bool = True) -> set[str]:
    return {module.partition(".")[0] for module in imports(path, everywhere=everywhere)}


def row_of(module: str) -> int | None:
    return next((index for index, names in enumerate(ORDER) if module.removeprefix("graft.") in names), None)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path: Path) -> None:
    forbidden = {"graft": {"jobs", "serve", *EDGE}, "jobs": {"serve"}, "serve": {"jobs"}}[path.parts[0]]
    assert not packages(path) & {*forbidden, "tests"}


@pytest.mark.parametrize(
    "path", [path for path in FILES if row_of(".".join(path.with_suffix("").parts)) is not None], ids=str
)
def test_library_is_layered(path: Path) -> None:
    row = row_of(".".join(path.with_suffix("").parts))
    rows = {module: row_of(module) for module in imports(path)}
    assert {
        module: found for module, found in rows.items() if found is not None and row is not None and found >= row
    } == {}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[:2] == ("graft", "training")], ids=str)
def test_training_sees_batches_never_the_processor(path: Path) -> None:
    assert not {"graft.processor", "graft.text.prompts", "graft.audio.clip", "graft.audio.features"} & set(
        imports(path)
    )


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_lives_in_one_file_of_graft(package: str) -> None:
    users = [path for path in FILES if path.parts[0] == "graft" and package in packages(path)]
    assert len(users) <= 1
    assert all(package not in packages(path, everywhere=False) for path in FILES)


@pytest.mark.parametrize("name", REMOTE_CODE)
def test_model_travels_as_remote_code(name: str) -> None:
    path = Path("graft/model", f"{name}.py")
    outside = packages(path) - {"torch", "transformers", "huggingface_hub", "graft"} - sys.stdlib_module_names
    assert not outside
    siblings = {f"graft.model.{sibling}" for sibling in REMOTE_CODE}
    assert {module for module in imports(path) if module.startswith("graft")} <= siblings


@pytest.mark.parametrize("module", ["graft", "graft.config", "jobs.common.cli"])
def test_what_every_command_imports_is_cheap(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'ray', 'torch', 'transformers', 'fastapi'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
