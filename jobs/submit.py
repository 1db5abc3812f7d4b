"""Run a command on a Ray cluster, follow its output and end with its exit code.

A checkout is sent along, without the files that git ignores; an installed graft must be installed on the cluster too.
Paths in a recipe are the cluster's own. `ray job submit` does the same, but ends with 0 or 1 whatever the job's exit
code, with 0 after a stop too, and gives a stopped job 3 s to save.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from graft.errors import GraftError, RecipeError, checkout, require

from . import COMMANDS
from .common.cli import STOPPED, with_examples

STOP_WAIT_S = 120
"""Seconds between SIGTERM and SIGKILL for a job that is stopped, in which training saves a checkpoint."""
EXAMPLES = (
    "--address http://head:8265 stage1 --recipe fast-7b-stage1 model=/shared/graft data=/shared/data out=/shared/7b",
    "--env HF_TOKEN --no-wait build --recipe fast-7b-build out=/shared/graft",
)
"""Arguments that --help shows."""
PATIENCE_S = 120
"""Seconds for which a cluster may not answer before following a job ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a job; returns its exit code, 143 if it was stopped, 130 after Ctrl-C, 2 without a cluster."""
    options = _parser().parse_args(argv)
    name = None
    try:
        if options.command not in [command for group in COMMANDS.values() for command in group if command != "serve"]:
            raise RecipeError(f"there is no command {options.command} that runs as a job: `graft` lists the commands")
        client = _client(options.address)
        name = _submit(client, options)
        print(f"graft: job {name}", file=sys.stderr, flush=True)
        return 0 if options.no_wait else _exit_code(asyncio.run(_follow(client, name)))
    except KeyboardInterrupt:
        state = f"job {name} goes on; `ray job stop {name}` ends it" if name else "interrupted"
        print(f"graft: {state}", file=sys.stderr)
        return 130
    except GraftError as error:
        print(f"graft: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="graft submit",
        description=with_examples(__doc__, [f"submit {example}" for example in EXAMPLES]),
        formatter_class=formatter,
        allow_abbrev=False,
    )
    address = "URL of the cluster's dashboard (default: the variables RAY_API_SERVER_ADDRESS, RAY_ADDRESS)"
    parser.add_argument("--address", metavar="URL", help=address)
    env = "environment variable of the job; without a value it is copied from here"
    parser.add_argument("--env", metavar="NAME[=VALUE]", action="append", default=[], help=env)
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    parser.add_argument("command", metavar="COMMAND", help="command of graft to run, such as stage1")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the command")
    return parser


def _client(address: str | None) -> Any:
    """Connect to the cluster's Jobs API; under RAY_AUTH_MODE=token by RAY_AUTH_TOKEN or ~/.ray/auth_token."""
    require("ray", extra="jobs")
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # its client logs each file that git ignores
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise RecipeError("no cluster is named: give --address http://HEAD:8265, or set RAY_ADDRESS")
    try:
        return JobSubmissionClient(address)
    except _client_errors() as error:
        raise GraftError(f"cluster {address}: {error}") from error


def _client_errors() -> tuple[type[Exception], ...]:
    """List what a client raises: no connection, a lost one, no token or a wrong one, a request that is refused."""
    import aiohttp
    from ray.exceptions import AuthenticationError

    return (OSError, RuntimeError, ValueError, AuthenticationError, aiohttp.ClientError)


def _submit(client: Any, options: argparse.Namespace) -> str:
    """Send the job; returns its name. Raises GraftError where the cluster refuses it."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    for given in options.env:
        variable, equals, value = given.partition("=")
        if not equals and variable not in os.environ:
            raise RecipeError(f"--env {variable} has no value, and none is set here")
        variables[variable] = value if equals else os.environ[variable]
    environment: dict[str, Any] = {"env_vars": variables}
    source = checkout()
    if source:
        environment["working_dir"] = str(source)
    package = "jobs" if source else "graft.jobs"
    command = shlex.join(["python", "-m", f"{package}.{options.command}", *options.arguments])
    try:
        return client.submit_job(entrypoint=command, runtime_env=environment)
    except _client_errors() as error:
        raise GraftError(f"the cluster refused the job: {error}") from error


async def _follow(client: Any, name: str) -> Any:
    """Print a job's output until it ends, reconnecting where the connection breaks; returns the job's last state."""
    printed, answered = 0, time.monotonic()  # characters of the output; when the cluster last answered
    while True:
        received, is_complete = 0, False
        try:
            async for text in client.tail_job_logs(name):  # from the beginning, each time
                received += len(text)
                if received > printed:
                    print(text[printed - received :], end="", flush=True)
                    printed = received
            is_complete = True
        except _client_errors():
            pass
        try:
            job = client.get_job_info(name)
        except _client_errors() as error:
            if time.monotonic() - answered > PATIENCE_S:
                raise GraftError(f"the cluster no longer answers; job {name} may go on there") from error
        else:
            if not job.status.is_terminal():
                answered = time.monotonic()
            elif is_complete or time.monotonic() - answered > PATIENCE_S:  # its log may be gone with its node
                return job
        await asyncio.sleep(1)


def _exit_code(job: Any) -> int:
    """Return the exit code of a job as a shell does: 128 plus a signal's number; 1 if the job never began."""
    if job.status == "STOPPED":
        return STOPPED
    code = int(job.driver_exit_code or 0)
    if job.status == "FAILED" and not code:
        print(f"graft: {job.message}", file=sys.stderr)
        return 1
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
