"""Numbers on a benchmark's command line that must be more than nothing, as argparse's `type`."""

import argparse
import math


def positive_int(text: str) -> int:
    """Read a whole number, 1 or more. Raises ValueError, which argparse words by this function's name, and ArgumentTypeError."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than one")
    return number


def positive_float(text: str) -> float:
    """Read a finite number above 0. Raises ValueError, which argparse words by this function's name, and ArgumentTypeError."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number
