"""Fixtures that the tests of the service share, so that each test process makes them once.

The files that use `service` belong together: test_app.py, test_metrics.py and http/test_openai_client.py. Their mark
xdist_group("serve") brings them to one process, which starts the application once. Files that kill or replace replicas
start their own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import tiny_models

if TYPE_CHECKING:
    from graft.inference.transcriber import Transcriber
    from serve.backends.local import LocalBackend
    from serve.decode.decoder import Decoder
    from tests.support.ray_service import RunningService


@pytest.fixture(scope="session")
def graft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny graft that takes context words."""
    folder = tmp_path_factory.mktemp("serve") / "tiny-graft"
    return tiny_models.save_tiny_graft(folder, trained_styles=["formatted"], trained_context=True)


@pytest.fixture(scope="session")
def transcriber(graft_folder: Path) -> "Iterator[Transcriber]":
    """A Transcriber in this process, whose transcripts the service's are compared with."""
    from graft.inference.transcriber import open_transcriber

    opened = open_transcriber(graft_folder)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def backend(transcriber: "Transcriber") -> "LocalBackend":
    """The backend of services in this process; the transcriber closes it."""
    from serve.backends.local import LocalBackend

    return LocalBackend(transcriber)


@pytest.fixture(scope="module")
def decoder() -> "Iterator[Decoder]":
    """The decoder of services in this process. A module ends its processes, because other modules count theirs."""
    from tests.support.http_service import open_decoder

    with open_decoder(max_duration_s=60) as opened:
        yield opened


@pytest.fixture(scope="session")
def started_services() -> "list[RunningService]":
    """The shared applications that this process has started, the last of which may still run."""
    return []


@pytest.fixture(scope="module")
def service(
    ray_started: None,
    graft_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    started_services: "list[RunningService]",
) -> "RunningService":
    """The shared application on Ray Serve, started again where a module in between has ended it."""
    from tests.support.ray_service import start_shared_service

    if not (started_services and started_services[-1].is_up()):
        started_services.append(start_shared_service(graft_folder, tmp_path_factory.mktemp("keys")))
    return started_services[-1]
