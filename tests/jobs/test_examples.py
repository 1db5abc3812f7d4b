"""The examples that --help shows are understood; those with --plan are run, as they need no data and no cluster."""

import importlib
import shlex

import pytest

from jobs import COMMANDS
from tests.test_documents import check_graft


def examples(command: str) -> tuple[str, ...]:
    module = importlib.import_module("serve.command" if command == "serve" else f"jobs.{command}")
    assert len(module.EXAMPLES) in (2, 3)
    return module.EXAMPLES


ALL = [(command, example) for group in COMMANDS.values() for command in group for example in examples(command)]


@pytest.mark.parametrize(("command", "example"), ALL, ids=lambda text: text[:40])
def test_an_example_is_understood(command, example, monkeypatch):
    monkeypatch.setattr("jobs.common.cli.check_inputs", lambda recipe: None)  # its files are the reader's
    check_graft([command, *(word for word in shlex.split(example) if word not in (">", "stage1.schema.json"))])


@pytest.mark.parametrize(("command", "example"), [one for one in ALL if "--plan" in one[1]], ids=lambda text: text[:40])
def test_an_example_of_a_plan_is_run(command, example, capsys):
    assert importlib.import_module(f"jobs.{command}").main(argv=shlex.split(example)) == 0
    output = capsys.readouterr()
    assert "\ntime  " in output.out
    assert output.err == ""
