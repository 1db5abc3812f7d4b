"""Run a command on a Ray cluster, follow its output and end with its exit code.

Usage: `python -m jobs.submit [--address URL] COMMAND key=value ...`

The checkout goes along, less what git ignores; a recipe's paths are the cluster's own. `ray job submit` does the same, but ends with 0 or 1
whatever the job's exit code, with 0 after a stop too, and gives a stopped job 3 s to save.
"""

import argparse
import asyncio
import importlib.util
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.errors import GraftError, RecipeError, require

from .common.cli import STOPPED

ROOT = Path(__file__).parents[1]
STOP_WAIT_S = 120
"""What a job has between SIGTERM and SIGKILL when it is stopped: training saves meanwhile."""
PATIENCE_S = 120
"""For so long a cluster may not answer before following a job ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a job; returns its exit code; 143 if it was stopped, 130 after Ctrl-C (it goes on), 2 without a cluster."""
    options = _parser().parse_args(argv)
    name = None
    try:
        _check_verb(options.verb)
        client = _client(options.address)
        name = _submit(client, options)
        print(f"graft: job {name}", file=sys.stderr, flush=True)
        return 0 if options.no_wait else _exit_code(asyncio.run(_follow(client, name)))
    except KeyboardInterrupt:
        print(
            f"graft: {f'job {name} goes on; `ray job stop {name}` ends it' if name else 'interrupted'}", file=sys.stderr
        )
        return 130
    except GraftError as error:
        print(f"graft: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit", description="Run a job on a cluster.", allow_abbrev=False
    )
    parser.add_argument(
        "--address", metavar="URL", help="of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS)"
    )
    parser.add_argument(
        "--env", metavar="NAME[=VALUE]", action="append", default=[], help="a variable of the job; as here by default"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    parser.add_argument("verb", metavar="VERB", help="a job, such as stage1")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="what it is told")
    return parser


def _check_verb(verb: str) -> None:
    """Raise RecipeError unless `python -m jobs.VERB` does something."""
    module = importlib.util.find_spec(f"jobs.{verb}") if verb.isidentifier() else None
    if module is None or not module.origin or '__name__ == "__main__"' not in Path(module.origin).read_text():
        raise RecipeError(f"there is no job {verb}")


def _client(address: str | None) -> Any:
    """A client of the cluster's Jobs API; its token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token, where RAY_AUTH_MODE=token."""
    require("ray", extra="jobs")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of each file that git ignores
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise RecipeError("no cluster is named: give --address http://HEAD:8265, or set RAY_ADDRESS")
    try:
        return JobSubmissionClient(address)
    except _faults() as error:
        raise GraftError(f"cluster {address}: {error}") from error


def _faults() -> tuple[type[Exception], ...]:
    """What a client raises: no connection, a lost one, no token or a wrong one, what the cluster refuses."""
    import aiohttp
    from ray.exceptions import AuthenticationError

    return (OSError, RuntimeError, ValueError, AuthenticationError, aiohttp.ClientError)


def _submit(client: Any, options: argparse.Namespace) -> str:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    for given in options.env:
        variable, equals, value = given.partition("=")
        if not equals and variable not in os.environ:
            raise RecipeError(f"--env {variable} has no value, and none is set here")
        variables[variable] = value if equals else os.environ[variable]
    command = shlex.join(["python", "-m", f"jobs.{options.verb}", *options.arguments])
    try:
        return client.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT), "env_vars": variables})
    except _faults() as error:
        raise GraftError(f"the cluster refused the job: {error}") from error


async def _follow(client: Any, name: str) -> Any:
    """Print what a job prints until it ends, also when the connection breaks meanwhile; returns what the cluster knows of it then."""
    told, answered = 0, time.monotonic()
    while True:
        seen, is_whole = 0, False
        try:
            async for text in client.tail_job_logs(name):
                seen += len(text)
                if seen > told:
                    print(text[told - seen :], end="", flush=True)
                    told = seen
            is_whole = True
        except _faults():
            pass
        try:
            job = client.get_job_info(name)
        except _faults() as error:
            if time.monotonic() - answered > PATIENCE_S:
                raise GraftError(f"the cluster no longer answers; job {name} may go on there") from error
        else:
            if not job.status.is_terminal():
                answered = time.monotonic()
            elif is_whole or time.monotonic() - answered > PATIENCE_S:  # its log may be gone with its node
                return job
        await asyncio.sleep(1)


def _exit_code(job: Any) -> int:
    """The exit code of a job that ended, as a shell tells it: 128 and the number of a signal that ended it; 1 if it never began."""
    if job.status == "STOPPED":
        return STOPPED
    code = int(job.driver_exit_code or 0)
    if job.status == "FAILED" and not code:
        print(f"graft: {job.message}", file=sys.stderr)
        return 1
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
