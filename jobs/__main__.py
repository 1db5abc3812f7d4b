"""Run the command `graft`: list the commands, or run one of them. In a checkout `python -m jobs` is the same.

No command is imported before it is run, so that the list appears at once.
"""

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import COMMANDS

SERVICE = "serve.command"
"""Module of `graft serve`, beside this package. Jobs do not know the service: only its command line is run here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns its exit code, or 2 where there is no such command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    names = [command for group in COMMANDS.values() for command in group]
    if name in names:
        return _run(name, arguments)
    if name == "--version":
        from graft import __version__

        print(f"graft {__version__}")
        return 0
    if name in ("-h", "--help"):
        print(command_list())
        return 0
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    print(f"graft: error: there is no command {name}: {hint}`graft` lists the commands", file=sys.stderr)
    return 2


def command_list() -> str:
    """Write one line for each command, the first of its module's docstring; no command is imported for it."""
    lines = ["usage: graft COMMAND [--help] [--recipe NAME] [key=value ...]"]
    for purpose, group in COMMANDS.items():
        lines += ["", f"{purpose}:"]
        lines += [f"  {command:<11} {_summary(command)}" for command in group]
    return "\n".join(lines)


def _run(command: str, arguments: Sequence[str]) -> int:
    if command != "serve":
        return int(importlib.import_module(f".{command}", __package__).main(argv=arguments))
    from .common.cli import run_job

    service = importlib.import_module(f"{str(__package__).removesuffix('jobs')}{SERVICE}")
    texts = {"summary": service.__doc__, "examples": service.EXAMPLES}
    return run_job(service.ServeRecipe, service.run, **texts, argv=arguments, command=command)


def _summary(command: str) -> str:
    path = Path(__file__).with_name(f"{command}.py")
    if command == "serve":
        path = Path(__file__).parents[1].joinpath(*SERVICE.split(".")).with_suffix(".py")
    return str(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))).partition("\n")[0]


if __name__ == "__main__":
    raise SystemExit(main())
