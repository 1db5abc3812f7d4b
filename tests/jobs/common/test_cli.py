"""Tests of the command line: errors in one line, --help, plans, keys as options, and errors inside Ray's wrappers."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from graft.config import Recipe
from graft.errors import AudioError, DataError, RecipeError, install_command
from graft.keys import HEADINGS, OutputKey, first_sentence, key_groups
from jobs import COMMANDS
from jobs.__main__ import main
from jobs.common.cli import PlanOptions, disk_fault, find_recipe, run_job, user_message
from jobs.schema import NAMES, recipe_class
from jobs.stage1 import Stage1Recipe
from tests.support.paths import ROOT


class Group(Recipe):
    """How things go."""

    rate: float = 0.5
    """How
    fast."""


class Job(Recipe):
    out: OutputKey[str]
    """The folder for the results. It is made."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    names: list[str] = Field(default=["x"])
    group: Group = Group(rate=0.25)
    """A group."""
    others: dict[str, list[Group]] | None = None


def run(arguments: list[str], *, cwd: Path, code: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, *(["-m", "jobs.prepare"] if code is None else ["-c", code]), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out=x", "sources=[m.jsonl]", "sede=3"], "unknown key sede=3 (did you mean 'seed'?"),
        (
            ["out=x", "sources=m.jsonl", "seed=three", "splits.train=2"],
            "splits.train=2: give a number from 0 to 1; seed=",
        ),
        (["out=x", "sources=missing.jsonl,b.csv"], "no such file or folder: sources=missing.jsonl, sources=b.csv\n"),
        (["out=x"], "key sources is required"),
        (["--recipe", "none.yaml"], "recipe none.yaml: no such file"),
        (["--recipe"], "expected one argument"),
        (["out"], "argument 'out' is not key=value"),
        (["--out=x", "--sede", "3", "--sources", "[m.jsonl]"], "unknown key sede=3 (did you mean 'seed'?"),
        (["--out", "x", "--sources=call #1, *.jsonl"], "no such file or folder: sources=call #1\n"),
        (["--sources", "[m.jsonl]", "--out"], "argument '--out' is not key=value or --key value: see --help"),
        (["--out", "--sources", "[m.jsonl]"], "argument '--out' is not key=value or --key value"),
        (["-out=x"], "argument '-out=x' is not key=value"),
        (["out=x", "--gpu"], "unknown key gpu (known here: "),
        (["out=x", "--joind.share"], "unknown key joind.share (did you mean 'joined'? --help lists all)"),
        (["out=x", "sources=[m.jsonl,", "b]"], "argument 'b]' is not key=value or --key value (a value with spaces"),
    ],
)
@pytest.mark.processes
def test_a_bad_command_line_ends_in_one_line(arguments, words, tmp_path):
    result = run(arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("graft: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_debug_shows_the_traceback_before_the_line(tmp_path):
    result = run(["out=x", "--debug", "sources=[missing.jsonl]"], cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("graft: error: no such file or folder")


# None in sys.modules is Python's own way to hide a package.
HIDDEN = """
import sys; sys.modules[{module!r}] = None
from jobs.prepare import *
sys.exit(run_job(PrepareRecipe, {main}, summary='x'))
"""


@pytest.mark.parametrize(
    ("module", "main", "remedy"),
    [
        ("pyarrow", "run", f"pyarrow is not installed: {install_command('jobs')}"),
        ("ray", "lambda recipe: __import__('ray')", f"ray is not installed: {install_command('jobs')}"),
        (
            "flash_attn",
            "lambda recipe: __import__('flash_attn')",
            f"flash_attn is not installed: {install_command('flash')}",
        ),
    ],
)
def test_a_missing_extra_ends_in_one_line(module, main, remedy, tmp_path):
    (tmp_path / "m.jsonl").touch()
    result = run(["out=x", "sources=m.jsonl"], cwd=tmp_path, code=HIDDEN.format(module=module, main=main))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("graft: error: ")
    assert result.stderr.endswith(f"{remedy}\n")
    assert result.stderr.count("\n") == 1


def test_help_documents_every_key(tmp_path, capsys):
    examples = ("out=x", "out=y kind=b")
    with pytest.raises(SystemExit) as caught:
        run_job(Job, lambda recipe: None, summary="Does it.\n\nMore.", examples=examples, command="do", argv=["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    parts = [
        "usage: graft do [--recipe NAME] [key=value ...] [--debug]\n",
        "Does it.\n\nexamples:\n  graft do out=x\n  graft do out=y kind=b\n\nMore.\n",
        "\noutput:\n  out (text, required)\n      The folder for the results.\n",
        "\nkeys:\n  kind = a (a | b)\n      Which.\n",
        "  names = [x] ([text, ...])\n",
        "  group = {rate: 0.25} ({...})\n      A group.\n",
        "  others = null ({text: [{...}, ...]} | null)\n",
        "\ngroup, others.NAME[]: How things go.\n  group.rate = 0.5 (number)\n      How fast.\n",
        "\nText is taken as it is typed.",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)
    result = run(["--help"], cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: graft prepare [--recipe NAME]")


def test_a_plan_takes_the_place_of_the_job(capsys):
    class Trained(Job):
        model: str

    seen: list[tuple[str | None, str, float | None]] = []

    def plan(recipe: Trained, options: PlanOptions) -> None:
        seen.append((recipe.out, options.device, options.price))

    def told(*argv: str, planner: Callable[[Trained, PlanOptions], None] | None = plan) -> int:
        return run_job(Trained, lambda recipe: 7, summary="", argv=argv, plan=planner)

    assert told("model=m", "--plan", "--device", "4090", "--price=2") == 0
    assert seen == [(None, "4090", 2.0)]
    assert told("model=m", "out=o") == 7
    for argv, words in [
        (["model=m"], "key out is required"),
        (["--plan"], "key model is required"),
        (["model=m", "out=o", "--price", "2"], "argument --price goes with --plan"),
        (["model=m", "--plan", "--share", "2"], "share=2: give a number over 0 and of at most 1"),
    ]:
        assert told(*argv) == 2
        assert words in capsys.readouterr().err
    assert told("model=m", "--plan", planner=None) == 2
    assert "unknown key plan (known here: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        told("--help")
    assert "Price of one device-hour in your currency" in capsys.readouterr().out


COMMAND_LIST = [command for group in COMMANDS.values() for command in group]
ANSWERS = """
import contextlib, io, runpy, sys
from jobs.__main__ import main

for command in sys.argv[1:]:
    for argument in ("--help", "wrong=key"):
        sys.argv = [command, argument]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                if command == "serve":
                    sys.exit(main(sys.argv))
                runpy.run_module(f"jobs.{command}", run_name="__main__")
            except SystemExit as end:
                code = end.code
        assert code == (0 if argument == "--help" else 2), (command, argument, code)
    heavy = {"torch", "transformers", "ray", "pyarrow", "pandas", "scipy"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""


@pytest.mark.processes
def test_help_and_a_wrong_key_are_answered_without_heavy_imports(tmp_path):
    result = run(COMMAND_LIST, cwd=tmp_path, code=ANSWERS)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_commands_gives_each_its_line(capsys):
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        assert [name for name, _ in lines] == COMMAND_LIST
        assert all(summary.endswith(".") for _, summary in lines)


def test_a_wrong_command_is_answered_with_a_close_one(capsys):
    assert main(["stage3", "out=x"]) == 2
    told = "graft: error: there is no command stage3: did you mean stage2? `graft` lists the commands\n"
    assert capsys.readouterr() == ("", told)
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err == "graft: error: there is no command nonsense: `graft` lists the commands\n"


def test_the_version_is_the_projects(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"graft {version('graft-asr')}\n"


def test_a_recipe_is_found_by_its_name_and_a_path_is_preferred(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packaged = ROOT / "jobs" / "recipes" / "fast-7b-stage1.yaml"
    for name in ("fast-7b-stage1", "fast-7b-stage1.yaml"):
        assert find_recipe(name, Stage1Recipe, "stage1") == str(packaged)
    with pytest.raises(RecipeError, match=r"^recipe fast-7b-stage1 is one of graft stage1: name one of graft stage2$"):
        find_recipe("fast-7b-stage1", recipe_class("stage2"), "stage2")
    Path("fast-7b-stage1.yaml").write_text("seed: 3\n")
    assert find_recipe("fast-7b-stage1.yaml", Stage1Recipe, "stage1") == "fast-7b-stage1.yaml"
    told = "^recipe fast-7b: no such file; recipes of graft for stage1 are fast-7b-stage1, "
    with pytest.raises(RecipeError, match=told):
        find_recipe("fast-7b", Stage1Recipe, "stage1")
    with pytest.raises(RecipeError) as caught:
        find_recipe("reference-7b-stgae2", recipe_class("stage2"), "stage2")
    first, *others = str(caught.value).partition(" are ")[2].split(", ")
    assert first == "reference-7b-stage2"
    assert "small-weights-further" in others
    assert not [name for name in others if name.endswith(("-build", "-data", "-evaluate", "-stage1"))]


def test_words_are_values_of_the_key_that_takes_them(tmp_path, monkeypatch):
    class Listing(Recipe):
        files: list[str]
        deep: bool = False

    def read(*argv: str) -> Listing | int:
        seen: list[Listing] = []
        code = run_job(Listing, seen.append, summary="", argv=argv, words="files")
        return seen[0] if seen else code

    named = ["a b.flac", "call #1.wav", "./x=1.wav", "2024-05-01"]
    assert read(*named) == Listing(files=named)
    assert read("a.flac", "--deep", "b.flac") == Listing(files=["a.flac", "b.flac"], deep=True)
    assert read("files=[c]") == Listing(files=["c"])
    monkeypatch.chdir(tmp_path)
    Path("a=b.flac").touch()
    Path("deep=false").touch()
    assert read("a=b.flac", "deep=false") == Listing(files=["a=b.flac"], deep=False)
    assert read("c=d.flac") == 2
    assert read("a.flac", "files=[c]") == 2
    assert run_job(Listing, lambda recipe: None, summary="", argv=["a.flac"]) == 2


@pytest.mark.processes
def test_output_that_nobody_reads_ends_a_command_quietly():
    plan = [sys.executable, "-m", "jobs", "stage1", "--recipe", "fast-7b-stage1", "model=fast-7b", "--plan"]
    with subprocess.Popen(plan, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 141)


def test_a_pipe_that_is_not_the_output_breaks_loudly(capfd):
    def run(recipe: Job) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_job(Job, run, summary="", argv=["out=a"])


def test_main_gets_the_recipe_and_gives_the_exit_code(capsys):
    assert run_job(Job, lambda recipe: None, summary="", argv=["out=a"]) == 0
    assert run_job(Job, lambda recipe: recipe.group.rate == 2, summary="", argv=["out=a", "group.rate=2"]) == 1

    def interrupted(recipe: Job) -> None:
        raise KeyboardInterrupt

    assert run_job(Job, interrupted, summary="", argv=["out=a"]) == 130
    assert capsys.readouterr().err == "graft: interrupted\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["out=a b", "group.rate=-2"],
        ["--out=a b", "--group.rate=-2"],
        ["--out", "a b", "--group.rate", "-2"],
        ["--group.rate", "-2", "out=a b"],
        ["--recipe", "{recipe}", "--group.rate", "-2", "--debug"],
    ],
)
def test_keys_may_be_written_as_options(argv, tmp_path):
    (tmp_path / "r.yaml").write_text("out: a b\n")
    seen: list[Job] = []
    given = [argument.format(recipe=tmp_path / "r.yaml") for argument in argv]
    assert run_job(Job, seen.append, summary="", argv=given) == 0
    assert seen == [Job(out="a b", group=Group(rate=-2))]


@pytest.mark.parametrize("command", ["stage1", "stage2", "transcribe", "evaluate"])
def test_no_key_of_a_command_is_an_option_too(command):
    """A key with the name of an option could be given only as key=value."""
    planned = importlib.import_module(f"jobs.{command}").main
    options = planned.keywords.get("plan_options", PlanOptions).model_fields
    assert not {"recipe", "debug", "plan", "help", *options} & planned.args[0].model_fields.keys()


@pytest.mark.parametrize("command", NAMES)
def test_every_key_stands_under_a_heading_and_says_what_it_is(command):
    for group in key_groups(recipe_class(command)):
        for key in group.members:
            assert first_sentence(key.meaning).endswith("."), key
            assert key.meaning[0].isupper() or key.meaning.split()[0].strip("`:") in key.values, key
            assert key.heading in HEADINGS or group.holders, key


def test_a_bug_keeps_its_traceback():
    def buggy(recipe: Job) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_job(Job, buggy, summary="", argv=["out=a"])
    handled = KeyError("bug")
    handled.__context__ = DataError("seen and handled before")
    assert user_message(handled) is None
    assert user_message(ModuleNotFoundError("No module named 'tpyo'", name="tpyo")) is None
    assert user_message(ModuleNotFoundError("No module named 'ray.tpyo'", name="ray.tpyo")) is None


def test_the_outer_of_two_errors_of_graft_speaks():
    outer = DataError("row 3: bad audio")
    outer.__cause__ = AudioError("bad audio")
    assert user_message(outer) == "row 3: bad audio"


RAY = """
import ray, ray.data
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from graft.errors import DataError, require
from jobs.common.cli import user_message

def fail(*ignored):
    raise DataError("row 7: no text: drop it")

def missing(*ignored):
    require("no_such_package", extra="train")

def message(action):
    try:
        action()
    except Exception as error:
        print("MESSAGE", type(error).__name__, "|", user_message(error))

class Worker:
    __init__ = fail
    def work(self): pass

ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
message(lambda: ray.get(ray.remote(fail).remote()))
message(lambda: ray.get(ray.remote(missing).remote()))
message(lambda: ray.get(ray.remote(Worker).remote().work.remote()))
message(lambda: ray.data.range(2).map_batches(fail).materialize())
message(lambda: ray.get(ray.remote(lambda: 1 / 0).remote()))
wrapped = UserExceptionWithTraceback(DataError("row 7: no text: drop it"), "Traceback ...")
for error in [WorkerGroupError("rank 1 ...", {0: RuntimeError("gloo"), 1: wrapped}), ControllerError(wrapped)]:
    print("MESSAGE", type(error).__name__, "|", user_message(error))
"""


@pytest.mark.ray
def test_errors_are_found_inside_rays_wrappers(tmp_path):
    result = run([], cwd=tmp_path, code=RAY)
    messages = [line.removeprefix("MESSAGE ") for line in result.stdout.splitlines() if line.startswith("MESSAGE ")]
    told = "| row 7: no text: drop it"
    assert messages == [
        f"RayTaskError(DataError) {told}",
        f"RayTaskError(MissingExtra) | no_such_package is not installed: {install_command('train')}",
        f"ActorDiedError {told}",
        f"RayTaskError(UserCodeException) {told}",
        "RayTaskError(ZeroDivisionError) | None",
        f"WorkerGroupError {told}",
        f"ControllerError {told}",
    ], result.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "OSError: [Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device",
            "the disk of .* is full",
        ),
        ("[Errno 122] Disk quota exceeded", "the disk of .* is full"),
        ("[Errno 30] Read-only file system: '/elsewhere'", "{out} cannot be written .Read-only file system.$"),
        ("FileNotFoundError: [Errno 2] Failed to open local file '{out}/a'", "{out} cannot be written .No such file"),
        ("[Errno 2] No such file or directory: '/elsewhere/a'", None),
    ],
)
def test_a_disk_that_fails_is_told_by_the_text_of_an_error(tmp_path, fault, said):
    found = disk_fault(RuntimeError(f"a task failed\n{fault.format(out=tmp_path)}"), tmp_path)
    assert found is None if said is None else re.match(said.format(out=tmp_path), found or "")
