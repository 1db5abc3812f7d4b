"""List the commands: `python -m jobs`."""

import ast
import sys
from pathlib import Path

from . import COMMANDS


def command_list() -> str:
    """Write one line for each command, the first of its module's docstring; no command is imported for it."""
    lines = [f"usage: python -m {__package__}.COMMAND [--help] [--recipe FILE] [key=value ...]"]
    for group in COMMANDS:
        lines.append("")
        for command in group:
            tree = ast.parse(Path(__file__).with_name(f"{command}.py").read_text())
            lines.append(f"  {command:<11} {str(ast.get_docstring(tree)).partition(chr(10))[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(command_list())
    sys.exit(0 if set(sys.argv[1:]) <= {"-h", "--help"} else 2)
