"""The rooms keep their order: imports run one way and in no circle, and Ray and HTTP stay at the edge."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = sorted(path.relative_to(ROOT) for name in ("graft", "jobs", "serve") for path in (ROOT / name).rglob("*.py"))
EDGE = {"ray", "fastapi", "starlette", "uvicorn"}
OPTIONAL = ("deepspeed", "peft", "bitsandbytes", "vllm", "torchaudio")
COMMANDS = (
    "prepare label format build stage1 stage2 check merge export transcribe evaluate score report ablate demo submit "
    "bench schema"
)

ROOMS = {
    "graft": "errors imports redaction keys config storage model audio text data processor checkpoints training "
    "inference __init__",
    "jobs": f"common transcription training preparation evaluation {COMMANDS} __main__",
    "serve": "proxy logs fairness decode config service live metrics backends http app command",
}
"""The rooms of each package, the lowest first: a room imports from those before it."""

ABOVE_THE_COMMANDS = ("benchmarks",)
"""Rooms of jobs that measure commands, and so import them."""


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def imports(path: Path, *, everywhere: bool = True) -> frozenset[str]:
    """Name the modules that a file imports: all of them, `require("...")` too, or only those at its top level."""
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(name for node in (ast.walk(tree) if everywhere else tree.body) for name in _imported(node, path))


def _imported(node: ast.AST, path: Path) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (name.name for name in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            package = [*path.parts[: len(path.parts) - level]] if level else []
            base = ".".join([*package, *([module] if module else [])])
            members = {f"{base}.{name.name}" for name in names} & MODULES.keys()
            yield from members or {base}
        case ast.Call(func=ast.Name(id="require"), args=[ast.Constant(value=str(module)), *_]):
            yield module


def packages(path: Path, *, everywhere: bool = True) -> set[str]:
    return {module.partition(".")[0] for module in imports(path, everywhere=everywhere)}


def room_of(module: str) -> tuple[str, str]:
    """Split a module into its package and its room: "graft.audio.clip" -> ("graft", "audio")."""
    package, *rest = module.split(".")
    return package, rest[0] if rest else "__init__"


def rank(package: str, room: str) -> int:
    """Count the rooms below a room. The commands of jobs share a rank, and the benchmarks stand above them."""
    rooms = ROOMS[package].split()
    if room in ABOVE_THE_COMMANDS:
        return len(rooms)
    return rooms.index("prepare") if package == "jobs" and room in COMMANDS.split() else rooms.index(room)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_packages_import_one_way(path: Path) -> None:
    forbidden = {"graft": {"jobs", "serve", *EDGE}, "jobs": {"serve"}, "serve": {"jobs"}}[path.parts[0]]
    assert not packages(path) & {*forbidden, "tests"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[1] != "bench.py"], ids=str)
def test_a_room_imports_only_from_those_below_it(path: Path) -> None:
    package, room = room_of(module_of(path))
    inside = {room_of(module)[1] for module in imports(path) if module.split(".")[0] == package and module != package}
    above = {other for other in inside - {room} if rank(package, other) > rank(package, room)}
    siblings = {other for other in inside - {room} if rank(package, other) == rank(package, room)}
    assert not above
    assert not siblings or package == "jobs"  # commands that run others: demo, ablate


def test_no_imports_form_a_circle() -> None:
    graph = {name: [module for module in imports(path) if module in MODULES] for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_only_commands_stand_at_the_top_of_jobs() -> None:
    top = {path.stem for path in FILES if path.parts[0] == "jobs" and len(path.parts) == 2}
    assert top == {*COMMANDS.split(), "__init__", "__main__"}


@pytest.mark.parametrize("package", ["jobs", "serve"])
def test_siblings_are_imported_relatively(package: str) -> None:
    """A wheel holds the packages under other names, graft.jobs and graft.serve."""
    absolute = {
        f"{path}:{node.lineno}"
        for path in FILES
        if path.parts[0] == package
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if (isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == package)
        or (isinstance(node, ast.Import) and any(name.name.split(".")[0] == package for name in node.names))
    }
    assert not absolute


def test_every_room_says_what_it_is_for() -> None:
    silent = [
        str(path)
        for path in FILES
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse((ROOT / path).read_text()))
    ]
    assert not silent


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[:2] == ("graft", "training")], ids=str)
def test_training_sees_batches_never_clips(path: Path) -> None:
    assert not {room_of(module)[1] for module in imports(path)} & {"audio", "text"}


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_lives_in_one_file_of_graft(package: str) -> None:
    users = [path for path in FILES if path.parts[0] == "graft" and package in packages(path)]
    assert len(users) <= 1
    assert all(package not in packages(path, everywhere=False) for path in FILES)


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[:2] == ("graft", "model")], ids=str)
def test_the_model_travels_as_remote_code(path: Path) -> None:
    outside = packages(path) - {"torch", "transformers", "huggingface_hub", "graft"} - sys.stdlib_module_names
    assert not outside
    assert all(module.startswith("graft.model.") for module in imports(path) if module.startswith("graft"))


@pytest.mark.parametrize("module", ["graft", "graft.config", "jobs.common.cli"])
@pytest.mark.processes
def test_what_every_command_imports_is_cheap(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'ray', 'torch', 'transformers', 'fastapi'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
