"""Tests that jobs.submit prints each line once over broken connections, and passes on the exit code of a job."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from jobs import submit

TEXT = ["first\n", "second\n", "third\n"]


class Client:
    """A Jobs API that breaks off in a log the first `breaks` times, and whose job runs for `turns` requests."""

    def __init__(self, *, breaks: int, turns: int = 0):
        self.breaks, self.turns = breaks, turns

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self.breaks -= 1
        yield TEXT[0]
        yield TEXT[1][:3]
        if self.breaks >= 0:
            raise ConnectionError
        yield TEXT[1][3:]
        yield TEXT[2]

    def get_job_info(self, name: str) -> SimpleNamespace:
        self.turns -= 1
        return SimpleNamespace(status=JobStatus.RUNNING if self.turns >= 0 else JobStatus.SUCCEEDED)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PATIENCE_S", 0.5)


@pytest.mark.seconds
def test_a_broken_connection_prints_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    job = asyncio.run(submit._follow(Client(breaks=1, turns=1), "name"))
    assert job.status == JobStatus.SUCCEEDED
    assert capsys.readouterr().out == "".join(TEXT)


@pytest.mark.seconds
def test_a_log_that_is_gone_is_not_waited_for_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    job = asyncio.run(submit._follow(Client(breaks=10**6), "name"))
    assert job.status == JobStatus.SUCCEEDED
    assert capsys.readouterr().out == "first\nsec"


@pytest.mark.parametrize("verb", ["nothing", "compare", "stage1.fit"])
def test_what_is_no_job_is_not_sent(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--address", "http://127.0.0.1:1", verb]) == 2
    assert (
        capsys.readouterr().err
        == f"graft: error: there is no command {verb} that runs as a job: `graft` lists the commands\n"
    )


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
        ("STOPPED", -15, 143),
    ],
)
def test_a_job_s_exit_code_is_passed_on(status: str, driver: int | None, code: int) -> None:
    job = SimpleNamespace(status=JobStatus(status), driver_exit_code=driver, message="it never began")
    assert submit._exit_code(job) == code
