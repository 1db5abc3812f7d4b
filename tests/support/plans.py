"""Read numbers out of what --plan prints, and hold that a plan starts nothing."""

import re


def never(recipe: object) -> None:
    """Stand for a command's `run`, which a plan does not call."""
    raise AssertionError("a plan starts nothing")


def number(text: str, pattern: str) -> float:
    """Return the number in place of # in a pattern."""
    found = re.search(pattern.replace("#", r"([\d,.]*\d)"), text)
    assert found, f"{pattern} is not in\n{text}"
    return float(found[1].replace(",", ""))
