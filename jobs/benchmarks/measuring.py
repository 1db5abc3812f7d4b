"""How benchmarks measure: ways to do the same work in turns, wall time beside this process's CPU time, and medians of ratios."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Numbers = dict[str, float]


@dataclass(frozen=True)
class Findings:
    """What a benchmark found: numbers by name, and the text that shows them."""

    numbers: Numbers
    text: str


@dataclass(frozen=True)
class Spent:
    """Seconds of the clock, and of all this process's threads on a core: the second does not grow while others hold the cores."""

    wall_s: float
    cpu_s: float


def spent_on(work: Callable[[], object]) -> Spent:
    """Measure one piece of work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(ways: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[Spent]]:
    """Measure each way `repetitions` times, in turns, so that a busy machine slows all alike."""
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, work in ways.items():
            spent[name].append(spent_on(work))
    return spent


def with_load(findings: Findings) -> Findings:
    """Findings with the machine's load: where it is more than the benchmark's own processes, wall times mislead."""
    load = os.getloadavg()[0]
    return Findings(findings.numbers | {"load_average": load}, f"{findings.text}\nload average {load:.1f}")


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times longer the slow way takes: the median of the ratios turn by turn."""
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def list_numbers(numbers: Numbers) -> str:
    """A line for each number."""
    width = max(map(len, numbers))
    return "\n".join(
        f"{name:<{width}}  {value:>12{',' if isinstance(value, int) else ',.2f'}}" for name, value in numbers.items()
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header: the first column on the left, the others on the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
