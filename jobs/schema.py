"""Print the JSON schema of a command's recipes, by which an editor checks them and completes their keys.

An editor with the YAML language server reads the schema that a recipe's first line names:
`# yaml-language-server: $schema=stage1.schema.json`.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from graft.config import Recipe, recipe_schema

from . import COMMANDS
from .common.cli import with_examples

EXAMPLES = ("stage1 > stage1.schema.json", "transcribe")
"""Arguments that --help shows."""
WITHOUT_RECIPE = {"bench", "submit", "schema", "serve"}
"""Commands that read no recipe."""
NAMES = [command for group in COMMANDS.values() for command in group if command not in WITHOUT_RECIPE]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a schema; returns 0, or 2 for no command or one without recipes."""
    options = _parser().parse_args(argv)
    if options.command not in NAMES:
        fault = f"no recipes of {options.command}" if options.command else "no command is named"
        print(f"graft: error: {fault}: give one of {', '.join(NAMES)}", file=sys.stderr)
        return 2
    print(json.dumps(recipe_schema(recipe_class(options.command)), indent=2, ensure_ascii=False))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graft schema",
        description=with_examples(__doc__, [f"schema {example}" for example in EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=f"one of {', '.join(NAMES)}")
    return parser


def recipe_class(command: str) -> type[Recipe]:
    """Return the class of a command's recipes, the one that its `run` takes."""
    return importlib.import_module(f".{command}", __package__).run.__annotations__["recipe"]


if __name__ == "__main__":
    sys.exit(main())
