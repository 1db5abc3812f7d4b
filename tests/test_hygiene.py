"""The checks that every test must pass besides its own can fail."""

import sys
from types import ModuleType

import pytest

from tests.support.hygiene import loaded_twice
from tests.support.paths import ROOT

pytest_plugins = ["pytester"]

SUITE = """
import importlib.util, os, subprocess, sys, time, types
from pathlib import Path
import pytest
from tests.support.paths import ROOT

def test_clean():
    subprocess.run([sys.executable, "-c", ""], check=True)

def test_unmarked_ray():
    running = []
    sys.modules["ray"] = types.SimpleNamespace(is_initialized=lambda: bool(running))
    assert not sys.modules["ray"].is_initialized()
    running.append(True)

def test_unmarked_ray_of_others():
    assert sys.modules["ray"].is_initialized()

@pytest.mark.ray
def test_marked_ray_of_others():
    assert sys.modules["ray"].is_initialized()
    del sys.modules["ray"]

def test_unmarked_weights():
    Path(os.environ["GRAFT_CACHE"], "bundled").mkdir(parents=True)

@pytest.mark.bundled
def test_marked_weights():
    assert os.environ["GRAFT_CACHE"] == "given"

def test_zombie():
    os.waitid(os.P_PID, subprocess.Popen([sys.executable, "-c", ""]).pid, os.WEXITED | os.WNOWAIT)

def test_after_a_zombie():
    pass

def test_left_running():
    global left
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
"""
NEXT_FILE = """
import importlib.util, sys
import graft.errors
import test_first

def test_of_the_next_file():
    test_first.left.kill()
    test_first.left.wait()

def test_two_names():
    spec = importlib.util.spec_from_file_location("errors_again", graft.errors.__file__)
    sys.modules["errors_again"] = importlib.util.module_from_spec(spec)
"""


@pytest.mark.processes
def test_what_is_left_behind_or_not_marked_fails(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GRAFT_CACHE", "given")
    pytester.makeini("[pytest]\nmarkers =\n    ray\n    bundled\n")
    pytester.makepyfile(test_first=SUITE, test_second=NEXT_FILE)
    result = pytester.runpytest_subprocess("-p", "tests.support.hygiene", "-p", "no:cacheprovider", "-rE")
    expected = {
        "test_unmarked_ray": "it uses Ray",
        "test_unmarked_ray_of_others": "it uses Ray",
        "test_unmarked_weights": "it opens the bundled weights",
        "test_zombie": "it has not waited for its processes",
        "test_left_running": "its module leaves processes running: *time.sleep(60)",
        "test_two_names": "loaded under more than one name: *errors_again",
    }
    result.assert_outcomes(passed=11, errors=len(expected))
    result.stdout.fnmatch_lines([f"*::{name}: *{words}*" for name, words in expected.items()])


def test_only_a_file_of_the_product_with_two_names_is_found() -> None:
    def module(path: str) -> ModuleType:
        made = ModuleType("made")
        made.__file__ = str(ROOT / path)
        return made

    build = module("jobs/build.py")
    harmless = {
        "__main__": build,
        "jobs.build": build,
        "a": module("tests/conftest.py"),
        "b": module("tests/conftest.py"),
    }
    assert loaded_twice(harmless) == []
    assert loaded_twice(harmless | {"graft.jobs.build": module("jobs/build.py")}) == [
        ["jobs.build", "graft.jobs.build"]
    ]
    assert loaded_twice(sys.modules) == []
