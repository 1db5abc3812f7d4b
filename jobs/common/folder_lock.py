"""Keep a folder for one run at a time, on a disk or on a file system that several machines share.

no claim -> .lock-1; claims whose runs are all gone -> the one with the next number, and they are removed

A claim is a file that names its process, and its process changes it every few seconds. Whether a process of this
machine runs is looked up. Of another machine's, or of another container's, the claim is watched: only this process's
clock counts, so clocks may differ. Claims are made by exclusive creation and never replaced, so that of any number of
processes that find a run gone, one gets the folder. A process that has lost its claim ends.

The file system must create files exclusively, and show at the opening of a file what another machine wrote: local
disks do, and NFS from version 3 on, Lustre, CephFS and SMB. Mounted buckets do not create exclusively: two runs that
begin there at the same moment may both begin, and one of them ends at its next heartbeat.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from graft.errors import OutputError

HEARTBEAT_S = 5.0
"""Seconds between two changes of a claim."""
SILENCE_S = 60.0
"""Seconds without a change after which a run on another machine counts as gone. They are counted while its claim can be
read, so that a file system that does not answer is nobody's silence."""
MOST_MISSES = 10
"""Times that the folder may be removed, by other runs which end, between its making and that of the claim."""
EXIT_CODE = 2
"""Exit code of a process that has lost its claim."""


@dataclass(frozen=True)
class Claim:
    """The process that a folder belongs to."""

    token: str
    host: str
    machine: str
    """The running kernel and the namespace of its process ids; "" where they are not known."""
    pid: int
    started: int
    """When the process started, in clock ticks since boot."""
    since: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """This process's claim to a folder. `check` ends the process when the claim is lost, as every heartbeat does."""

    def __init__(self, stem: Path, *, output: str, heartbeat_s: float, silence_s: float) -> None:
        self._stem, self._output = stem, output
        self._heartbeat_s, self._silence_s = heartbeat_s, silence_s
        self._claim = _own_claim()
        self._number = self._beats = self._misses = 0
        self._made: list[Path] = []  # folders, the deepest first
        self._beating, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="graft-lock", daemon=True)

    def acquire(self) -> None:
        """Claim the folder. Raises OutputError when another run has it, OSError when no claim can be written."""
        while True:
            claims = self._read_claims()
            for number, text in reversed(claims.items()):
                self._wait_until_gone(number, text)
            if claims != self._read_claims() or not self._create(number := max(claims, default=0) + 1):
                continue
            others = self._read_claims()
            if others.pop(number, None) is not None and others == claims:
                break
            # Another run came in between. It saw this claim, or this process sees that run's: neither goes on.
            self._path(number).unlink(missing_ok=True)
            time.sleep(secrets.randbelow(1000) / 1000 * self._heartbeat_s / 10)
        for gone in claims:
            self._path(gone).unlink(missing_ok=True)
        self._number = number
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; a folder that was made for the claim and stayed empty is removed."""
        self._ended.set()
        self._thread.join()
        self.check()
        with contextlib.suppress(OSError):  # of a process that has ended, a claim is no hindrance
            self._path(self._number).unlink()
        self._remove_made()

    def check(self) -> None:
        """Change the claim once more, and end this process when it is gone or followed by another run's."""
        with self._beating:
            if not self._beat() or os.path.exists(self._path(self._number + 1)):
                self._end()

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            self.check()

    def _beat(self) -> bool:
        """Change the claim; returns whether it is still this process's. Other faults than a missing file may pass."""
        try:
            with self._path(self._number).open("r+b", buffering=0) as file:
                if self._claim.token.encode() not in file.read():
                    return False
                self._beats += 1
                file.seek(0)
                file.write(self._text())  # as long as before
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ESTALE)
        return True

    def _end(self) -> NoReturn:
        """End this process, without the cleaning up that would remove what the other run writes."""
        with contextlib.suppress(Exception):
            claims = [one for text in self._read_claims().values() if (one := _parse(text)) and one != self._claim]
            gone = "another run took it and has ended, or its lock was removed"
            who = f"another run has it now ({claims[-1]})" if claims else gone
            sys.stdout.flush()
            print(
                f"graft: error: output {self._output} is no longer this run's: {who}. This run was suspended, or could "
                "not reach the folder; it stops, and what it has finished is kept",
                file=sys.stderr,
                flush=True,
            )
        os._exit(EXIT_CODE)

    def _create(self, number: int) -> bool:
        """Make the claim with a number; returns False when another process did, or removed the folder."""
        path = self._path(number)
        self._made += [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("xb", buffering=0)
        except FileExistsError:
            return False
        except FileNotFoundError:
            self._misses += 1
            if self._misses == MOST_MISSES:
                raise
            return False
        try:
            with file:
                file.write(self._text())
        except BaseException:
            path.unlink(missing_ok=True)
            self._remove_made()
            raise
        return True

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # a folder that holds something, and those above it
            for folder in self._made:
                folder.rmdir()

    def _wait_until_gone(self, number: int, text: str) -> None:
        """Return when a claim's run is gone, or the claim is another one. Raises OutputError when the run lives."""
        claim = _parse(text)
        if claim and claim.machine and (claim.machine, claim.host) == (self._claim.machine, self._claim.host):
            if state := _process_state(claim):
                raise self._in_use(claim, state)
            return
        if claim:
            print(
                f"graft: output {self._output} is another run's ({claim}), which cannot be looked up from here: "
                f"waiting up to {self._silence_s:.0f} s for its heartbeat",
                file=sys.stderr,
                flush=True,
            )
        look_s = self._heartbeat_s / 5
        for _ in range(round(self._silence_s / look_s)):
            time.sleep(look_s)
            now = _read(self._path(number))
            if now == text:
                continue
            if claim and (changed := _parse(now)) and changed == claim:
                raise self._in_use(claim, "alive")
            return

    def _in_use(self, claim: Claim, state: str) -> OutputError:
        advice = f"let it go on (kill -CONT {claim.pid})" if state == "suspended" else "let it end"
        return OutputError(
            f"output {self._output} is in use by another run ({claim}), which is {state}: "
            f"{advice}, stop it, or choose another out="
        )

    def _read_claims(self) -> dict[int, str]:
        """Return the contents of all claims by number, in the order of the numbers."""
        prefix = f"{self._stem.name}-"
        try:
            names = os.listdir(self._stem.parent)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        texts = {number: _read(self._path(number)) for number in sorted(int(one) for one in numbers if one.isdecimal())}
        return {number: text for number, text in texts.items() if text is not None}

    def _path(self, number: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{number}")

    def _text(self) -> bytes:
        return json.dumps({**asdict(self._claim), "beats": f"{self._beats:010}"}).encode() + b"\n"


@contextlib.contextmanager
def lock_folder(
    stem: Path, *, output: str, heartbeat_s: float = HEARTBEAT_S, silence_s: float = SILENCE_S
) -> Iterator[FolderLock]:
    """Hold the lock with claims STEM-1, STEM-2, ... while the block runs; messages call it `output`.

    Raises OutputError when another run holds it, OSError when no claim can be written.
    """
    lock = FolderLock(stem.absolute(), output=output, heartbeat_s=heartbeat_s, silence_s=silence_s)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def _own_claim() -> Claim:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    pid = os.getpid()
    _, started = _stat(pid) or ("", 0)
    return Claim(secrets.token_hex(16), socket.gethostname(), _machine(), pid, started, now)


def _machine() -> str:
    """Name the running kernel, and the namespaces in which it counts processes and time for this one."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""  # /proc is another namespace's
        spaces = [f"/proc/self/ns/{kind}" for kind in ("pid", "time")]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(os.readlink(space) for space in spaces if os.path.lexists(space))])
    except OSError:
        return ""


def _process_state(claim: Claim) -> str | None:
    """Say whether a process of this machine is alive or suspended; None when it is gone."""
    if found := _stat(claim.pid):
        state, started = found
        is_gone = state in "ZX" or started != claim.started
        return None if is_gone else "suspended" if state in "Tt" else "alive"
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"  # though /proc hides it


def _stat(pid: int) -> tuple[str, int] | None:
    """Return the state of a process, as a letter, and when it started; None where /proc does not show it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _parse(text: str | None) -> Claim | None:
    """Read a claim; None for one that is not there, or not written in full yet."""
    try:
        values = json.loads(text or "")
        return Claim(**{name: values[name] for name in Claim.__dataclass_fields__})
    except (ValueError, TypeError, KeyError):
        return None
