"""Serve a model over HTTP, at OpenAI's transcription endpoint, until Ctrl-C.

The service runs on the Ray cluster that RAY_ADDRESS names, or else on a Ray of its own on this machine. Ray Serve's
commands `serve run` and `serve deploy` run it from a configuration file, and replace the model while it runs.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from graft.checkpoints.names import checkpoint_name
from graft.errors import GraftError, require
from graft.keys import MachineKey

from .config import ServeArgs
from .proxy.variables import ray_variables

APPLICATION = "graft"
"""Name of the application on the cluster."""
INGRESS = "Ingress"
"""Name of the deployment that answers HTTP."""
PROXY_GRACE_S = 60
"""Seconds after request_timeout_s after which the proxy gives up an ingress that has not ended the request itself."""
EXAMPLES = ("model=small", "model=runs/merged host=0.0.0.0 gpus_per_replica=1 max_replicas=4 key_file=keys.txt")
"""Arguments that --help shows."""


class ServeRecipe(ServeArgs):
    """The arguments of the service, and the address on which it listens."""

    host: MachineKey[str] = "127.0.0.1"
    """Address on which the service listens; 0.0.0.0 makes it listen on all addresses of the machine."""
    port: MachineKey[int] = Field(default=8000, ge=1, le=65535)
    """Port on which the service listens."""


def run(recipe: ServeRecipe) -> None:
    """Run the service until SIGINT or SIGTERM, and then until its requests end or there is a second one.

    Raises GraftError where it cannot start, ModelError, RecipeError.
    """
    for package in ("fastapi", "fastapi_offline", "ray"):
        require(package, extra="serve")
    _check_address(recipe.host, recipe.port)
    with _ray_variables(recipe):
        _serve_until_stopped(recipe)


def _serve_until_stopped(recipe: ServeRecipe) -> None:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from .app import build

    application = build(ServeArgs(**recipe.model_dump(exclude={"host", "port"})))
    print(f"graft: starting a service of {recipe.model} (about a minute on two cores)", flush=True)
    _start_ray(recipe)
    try:
        timeout_s = recipe.request_timeout_s + PROXY_GRACE_S
        serve.start(http_options={"host": recipe.host, "port": recipe.port, "request_timeout_s": timeout_s})
        try:
            serve.run(application, name=APPLICATION)
        except RuntimeError as error:
            raise GraftError(f"the service did not start: {str(error).strip().splitlines()[-1]}") from error
        print("\n".join(_how_to_ask(recipe)), flush=True)
        _wait_for_a_signal()
        print("graft: the service ends after the requests that it has; Ctrl-C again ends it at once", flush=True)
        # While the ingresses end their requests, the engines must stay: deleting the application stops both together.
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # a replica that died has no requests
            serve.get_deployment_handle(INGRESS, APPLICATION).broadcast("stop").results(timeout_s=timeout_s)
        serve.delete(APPLICATION)
    finally:
        ray.shutdown()


def _check_address(host: str, port: int) -> None:
    """Raise GraftError where another program listens, or this machine has no such address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise GraftError(f"{host}:{port}: {error.strerror}: give another host= or port=") from error


@contextlib.contextmanager
def _ray_variables(recipe: ServeRecipe) -> Iterator[None]:
    """Set what Ray reads when it is imported and started, unless the user has set it, until the block ends.

    A cluster that runs already has been told when it was started.
    """
    variables = {} if os.environ.get("RAY_ADDRESS") else ray_variables(recipe.request_timeout_s)
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        if folder := added.get("RAY_SERVE_HAPROXY_SERVER_STATE_BASE"):
            shutil.rmtree(folder, ignore_errors=True)


def _start_ray(recipe: ServeRecipe) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray with the CPUs that the replicas ask for."""
    import ray

    local: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        cpus = recipe.max_replicas * recipe.threads + recipe.max_ingress_replicas + 1
        local = {
            "address": "local",
            "num_cpus": max(cpus, os.cpu_count() or 1),
            "object_store_memory": 512 * 2**20,
            "include_dashboard": False,
        }
    ray.init(namespace="serve", log_to_driver=False, logging_level=logging.ERROR, **local)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _how_to_ask(recipe: ServeRecipe) -> Iterator[str]:
    from .http.middleware import ApiKeys

    url = f"http://{'127.0.0.1' if recipe.host == '0.0.0.0' else recipe.host}:{recipe.port}"
    has_keys = bool(ApiKeys.from_environment(recipe.key_file))
    key = ' -H "Authorization: Bearer $KEY"' if has_keys else ""
    model = recipe.name or checkpoint_name(recipe.model)
    yield f"graft: {model} is served at {url} until Ctrl-C; {url}/docs describes it. Ask it, for example:"
    yield f"  curl{key} -F file=@a.flac -F model={model} {url}/v1/audio/transcriptions"
    if not has_keys:
        yield "graft: there are no API keys, so everybody is answered; GRAFT_API_KEYS or key_file= sets them"


def _wait_for_a_signal() -> None:
    """Wait for SIGINT or SIGTERM. The next one raises KeyboardInterrupt."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    stopped.wait()
