"""Test with real processes that a folder is one run's at a time, and that no run which is gone keeps it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.common.folder_lock import lock_folder
from tests.support.paths import ROOT

pytestmark = pytest.mark.processes

HEARTBEAT_S, SILENCE_S = 0.2, 2.0
HOLD = f"""
import sys, time
from pathlib import Path
from graft.errors import OutputError
from jobs.common.folder_lock import lock_folder

sys.stdin.readline()
try:
    with lock_folder(Path(sys.argv[1], ".lock"), output="runs/a", heartbeat_s={HEARTBEAT_S}, silence_s={SILENCE_S}):
        print("held", flush=True)
        if sys.stdin.readline() == "write on\\n":
            time.sleep({5 * HEARTBEAT_S})
            print("written on", flush=True)
except OutputError as error:
    print(error, flush=True)
"""
"""Take the lock when a line comes, and hold it until another one comes."""
OTHER_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
needs_namespaces = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*OTHER_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="needs a namespace of process ids, as root may make",
)

Run = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start processes that take the lock of tmp_path / "out" on demand; they end with the test."""
    with ExitStack() as stack:

        def start_run(*prefix: str) -> Run:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            command = [*prefix, sys.executable, "-c", HOLD, str(tmp_path / "out")]
            run = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **pipes)
            stack.enter_context(run)
            stack.callback(run.kill)
            return run

        yield start_run


def tell(run: Run, line: str = "") -> None:
    assert run.stdin
    run.stdin.write(f"{line}\n")
    run.stdin.flush()


def answer(run: Run) -> str:
    assert run.stdout
    return run.stdout.readline().rstrip()


def take(run: Run) -> str:
    tell(run)
    return answer(run)


def claims(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".lock-*"))


def holder(folder: Path) -> dict:
    (name,) = claims(folder)
    return json.loads((folder / name).read_text())


def test_the_second_run_is_told_who_is_there_and_the_end_of_the_first_frees_the_folder(tmp_path, start):
    first, second, third = start(), start(), start()
    assert take(first) == "held"
    message = take(second)
    assert message.startswith(
        f"output runs/a is in use by another run (pid {first.pid} on {os.uname().nodename}, since 20"
    )
    assert message.endswith(" UTC), which is alive: let it end, stop it, or choose another out=")
    first.send_signal(signal.SIGSTOP)
    time.sleep(3 * HEARTBEAT_S)
    assert f"which is suspended: let it go on (kill -CONT {first.pid}), stop it" in take(third)
    first.send_signal(signal.SIGCONT)
    tell(first)
    assert first.wait(10) == 0
    assert not (tmp_path / "out").exists()  # it was made for the lock, and stayed empty
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out" / ".lock", output="runs/a"):
        assert claims(tmp_path / "out") == [".lock-1"]
    assert not claims(tmp_path / "out")


def test_a_killed_run_is_followed_at_once(tmp_path, start):
    first, second = start(), start()
    assert take(first) == "held"
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    began = time.monotonic()
    assert take(second) == "held"
    assert time.monotonic() - began < SILENCE_S / 2
    assert claims(tmp_path / "out") == [".lock-2"]
    tell(second)
    assert second.wait(10) == 0
    # Of a later process with the same number, only the time of its start differs.
    with lock_folder(tmp_path / "out" / ".lock", output="runs/a"):
        values = holder(tmp_path / "out")
    (tmp_path / "out" / ".lock-7").write_text(json.dumps(values | {"started": values["started"] - 1}))
    with lock_folder(tmp_path / "out" / ".lock", output="runs/a"):
        assert claims(tmp_path / "out") == [".lock-8"]


@pytest.mark.seconds
@pytest.mark.parametrize("dead", [False, True])
def test_of_processes_that_come_at_once_one_gets_the_folder(tmp_path, start, dead):
    runs = [start() for _ in range(12)]
    if dead:
        assert take(runs[0]) == "held"
        runs[0].kill()
        runs.pop(0).wait(10)
    for run in runs:
        tell(run)
    answers = [answer(run) for run in runs]
    (winner,) = (run for run, said in zip(runs, answers, strict=True) if said == "held")
    assert sum(f"(pid {winner.pid} on" in said for said in answers) == len(runs) - 1
    assert holder(tmp_path / "out")["pid"] == winner.pid


COUNT = """
import os, random, sys, time
from pathlib import Path
from graft.errors import OutputError
from jobs.common.folder_lock import lock_folder

end, log = time.monotonic() + 1.5, os.open(Path(sys.argv[1], "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while time.monotonic() < end:
    if os.fork():
        os.wait()
        continue
    random.seed(os.getpid())
    try:
        with lock_folder(Path(sys.argv[1], "out", ".lock"), output="a", heartbeat_s=0.05, silence_s=2):
            os.write(log, b"in\\n")
            time.sleep(random.choice([0, 0.002, 0.01]))
            os.write(log, b"out\\n")
            if random.random() < 0.5:
                os._exit(0)  # and leave the claim
    except OutputError:
        pass
    os._exit(0)
"""
"""Take the lock again and again in children, half of which die with it."""


@pytest.mark.seconds
def test_no_two_runs_hold_the_folder_however_often_it_changes_hands(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    runs = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(4)]
    assert [run.wait(60) for run in runs] == [0] * len(runs)
    lines = (tmp_path / "log").read_text().split()
    assert len(lines) > 10
    assert lines == ["in", "out"] * (len(lines) // 2)


@needs_namespaces
@pytest.mark.seconds
def test_a_run_in_another_container_lives_by_its_heartbeat_and_ends_when_it_was_followed(tmp_path, start):
    first, second, third = start(*OTHER_NAMESPACE), start(), start(*OTHER_NAMESPACE)
    assert take(first) == "held"
    began = time.monotonic()
    assert "which is alive: let it end" in take(second)
    assert time.monotonic() - began < SILENCE_S
    # The process is suspended: its heartbeat stops, and it is not told from one whose machine is gone.
    (inner,) = map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split())
    os.kill(inner, signal.SIGSTOP)
    began = time.monotonic()
    assert take(third) == "held"
    assert time.monotonic() - began >= SILENCE_S * 0.9
    assert claims(tmp_path / "out") == [".lock-2"]
    tell(first, "write on")
    os.kill(inner, signal.SIGCONT)
    said, fault = first.communicate(timeout=10)
    assert said == ""
    assert fault.startswith("graft: error: output runs/a is no longer this run's: another run has it now (pid ")
    assert fault.count("\n") == 1
    assert first.returncode == 2
    assert claims(tmp_path / "out") == [".lock-2"]


@pytest.mark.seconds
@pytest.mark.parametrize("text", ["", '{"pid": 1', "[]", "null"])
def test_a_claim_that_was_never_written_in_full_counts_as_silent(tmp_path, text):
    (tmp_path / ".lock-3").write_text(text)
    with lock_folder(tmp_path / ".lock", output="a", heartbeat_s=0.05, silence_s=0.3):
        assert claims(tmp_path) == [".lock-4"]


def test_a_run_whose_folder_was_removed_ends(tmp_path, start):
    run = start()
    assert take(run) == "held"
    shutil.rmtree(tmp_path / "out")
    tell(run, "write on")
    said, fault = run.communicate(timeout=10)
    assert (said, run.returncode) == ("", 2)
    assert "no longer this run's: another run took it and has ended, or its lock was removed. This" in fault


def test_where_no_claim_can_be_written_nothing_is_left(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), lock_folder(tmp_path / "file" / ".lock", output="a"):
        pass
    with pytest.raises(OSError, match=r"\.lock-1"), lock_folder(Path("/proc/.lock"), output="a"):
        pass
