"""Fixtures that several files of tests use; imports nothing that a bare machine lacks."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.common.console import quiet_libraries

quiet_libraries()  # before a test imports transformers: commands run in this process too, and print one line to stderr

RAY_CPUS = 16
"""Logical CPUs of the shared Ray: as many as the largest job and the largest service in the tests ask for together."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.import_plugin("tests.support.hygiene")
    # A shell's background jobs ignore interrupts, and so would the servers that tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, and each group of files by their mark xdist_group; begin with the first."""
    from xdist.scheduler import LoadGroupScheduling

    class FilesAndGroups(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).partition("::")[0]

    config.option.loadscopereorder = False
    return FilesAndGroups(config, log)


@pytest.fixture(scope="session")
def _shared_ray() -> Iterator[None]:
    """End the shared Ray after the last test."""
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def ray_started(_shared_ray: None) -> None:
    """Start the local Ray that all tests of this process share; after a module with a cluster of its own, another one.

    A fixture starts it rather than a test, because Ray's loggers keep the stderr that they see first, and that of a
    test is closed after it.
    """
    from jobs.common.cluster import connect
    from tests.support.hygiene import CACHE, choose_cache
    from tests.support.ray_service import service_variables

    with pytest.MonkeyPatch.context() as environment:  # what Ray itself adds must stay: those who join need its token
        for name, value in service_variables().items():
            environment.setenv(name, value)
        environment.setenv(CACHE, "")  # as it is now, it is to be again
        choose_cache(os.environ, bundled=True)  # its workers serve all tests
        connect(cpus=RAY_CPUS)


@pytest.fixture(scope="session")
def bundled_weights() -> None:
    """Give the mark `bundled` to the tests that use this fixture, or others that do."""


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Restore the number of threads after a test that measures one core."""
    import torch

    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
