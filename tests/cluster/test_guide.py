"""The sizing table in cluster/README.md holds the numbers that --plan prints."""

import re
from typing import Any

import pytest

from jobs import stage1, stage2
from jobs.common.cli import run_job
from tests.support.paths import ROOT

GUIDE = (ROOT / "cluster" / "README.md").read_text()
ROW = re.compile(
    r"^\| (?P<recipe>[\w-]+), stage (?P<stage>\d)(?P<nf4> \(NF4\))?(?:, `(?P<key>[\w=]+)`)? "
    r"\| (?P<workers>\d+) (?:RTX )?(?P<device>\w+) "
    r"\| (?P<gb>\d+) \| (?P<samples_per_s>[\d,]+) \| (?P<hours>[\d.]+) \| (?P<device_hours>[\d.]+) \|$",
    re.MULTILINE,
)
ROWS = list(ROW.finditer(GUIDE))
JOBS: dict[str, tuple[Any, Any]] = {"1": (stage1, stage1.Stage1Recipe), "2": (stage2, stage2.Stage2Recipe)}


def test_every_row_of_the_table_is_read() -> None:
    (block,) = re.findall(r"^\| recipe \| devices \|.*\n\|[-|]+\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    assert len(ROWS) == block.count("\n") >= 6


@pytest.mark.parametrize("row", ROWS, ids=[" ".join(row.group("recipe", "stage", "workers", "device")) for row in ROWS])
def test_a_row_of_the_sizing_table_is_what_plan_prints(row: re.Match[str], capsys: pytest.CaptureFixture[str]) -> None:
    job, recipe_class = JOBS[row["stage"]]
    recipe = ROOT / "jobs" / "recipes" / f"{row['recipe']}-stage{row['stage']}.yaml"
    argv = [
        "--recipe",
        str(recipe),
        f"model={row['recipe']}",
        f"workers={row['workers']}",
        *([row["key"]] if row["key"] else []),
    ]
    plan = ["--plan", "--device", row["device"].lower(), "--hours", "2500"]
    assert run_job(recipe_class, job.run, summary="", argv=[*argv, *plan], plan=job.plan) == 0
    output = capsys.readouterr().out
    found = [
        re.search(pattern, output, re.MULTILINE)
        for pattern in (
            r"^speed +([\d,.]+) samples/s",
            r"^time +([\d.,]+) h, ([\d.,]+) device",
            r"([\d.]+)  <- this recipe$",
        )
    ]
    (rate,), (hours, device_hours), (memory,) = (
        [float(number.replace(",", "")) for number in one.groups()] for one in found if one
    )
    assert float(row["samples_per_s"].replace(",", "")) == pytest.approx(rate, abs=0.5)
    assert float(row["hours"]) == pytest.approx(hours, abs=0.051)
    assert float(row["device_hours"]) == pytest.approx(device_hours, abs=0.051)
    assert float(row["gb"]) == pytest.approx(memory, abs=0.5)
    assert (", NF4" in output) == bool(row["nf4"])
    assert "1 (assumed: 10 s a clip" in output
    assert "at 45% of" in output
