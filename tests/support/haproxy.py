"""Run HAProxy as Ray Serve would, from the configuration that Ray writes, before servers of a test and without Ray."""

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.common.local_service import free_port
from serve.proxy.variables import haproxy_program
from tests.support.paths import ROOT

PROGRAM = ROOT / "serve" / "proxy" / "haproxy"
RUNNING = {"GRAFT_HAPROXY": str(haproxy_program())}


@dataclass(frozen=True)
class HAProxy:
    """A running HAProxy."""

    url: str

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def send(self, *parts: bytes, pause_s: float = 0.0) -> tuple[bytes, float]:
        """Send bytes on a connection of its own; return what comes back until it is closed, and after how long."""
        start, received = time.monotonic(), b""
        with socket.create_connection(self.address, timeout=30) as connection:
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause_s)
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65_536):
                    received += part
        return received, time.monotonic() - start


@contextlib.contextmanager
def run_haproxy(servers: Sequence[str] | None, **settings: Any) -> Iterator[HAProxy]:
    """Run HAProxy before the servers at these URLs until the block ends; None stands for Ray Serve without application.

    `settings` are those of write_configuration.
    """
    with tempfile.TemporaryDirectory(prefix="graft-", dir="/tmp") as folder:
        file, port = Path(folder, "haproxy.cfg"), free_port()
        write_configuration(file, servers, port=port, **settings)
        command = [str(PROGRAM), "-db", "-f", str(file), "-dR"]
        with subprocess.Popen(command, env=os.environ | RUNNING, stderr=subprocess.PIPE, text=True) as process:
            try:
                while process.poll() is None:
                    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                        break
                    time.sleep(0.01)
                else:
                    raise AssertionError(process.stderr and process.stderr.read())
                yield HAProxy(f"http://127.0.0.1:{port}")
            finally:
                process.kill()


def write_configuration(
    file: Path,
    servers: Sequence[str] | None,
    *,
    route: str = "/",
    port: int = 8000,
    health: str = "/-/healthz",
    **settings: Any,
) -> None:
    """Write what Ray Serve would write for an application with these ingress replicas.

    `health` is the address that tells whether a replica is up, and `settings` are Ray's, such as timeout_server_s=1.
    """
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    own = {
        "http_options": HTTPOptions(host="127.0.0.1", port=port),
        "socket_path": f"{file.parent}/admin.sock",
        "server_state_base": str(file.parent),
        "server_state_file": f"{file.parent}/server-state",
        "metrics_socket_path": f"{file.parent}/metrics.sock",
        "has_received_routes": True,
        "is_head": True,
    }
    backends = {}
    if servers is not None:
        targets = [server.removeprefix("http://").rpartition(":") for server in servers]
        replicas = [ServerConfig(f"ingress-{index}", host, int(port)) for index, (host, _, port) in enumerate(targets)]
        backends["http-app"] = BackendConfig(
            "http-app", route, app_name="app", servers=replicas, http_health_check_path=health
        )
    HAProxyApi(HAProxyConfig(**own | settings), backends, str(file))._generate_config_file_internal()


@contextlib.contextmanager
def answering_server(answer: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """Listen until the block ends, and have a function answer each request, whose head it gets; yields the URL.

    A function that returns resets the connection, as the death of a replica does.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=run, args=[connection], daemon=True).start()

        def run(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (part := connection.recv(65_536)):
                        return
                    head += part
                if re.match(rb"\S+ /-/healthz ", head):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    return
                answer(connection, head)
                # Unread bytes and this option make the end a reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield "http://{}:{}".format(*listening.getsockname())
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
