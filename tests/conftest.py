"""What several files of tests ask for; imports nothing that a bare machine lacks."""

from collections.abc import Iterator

import pytest

from jobs.common.console import quiet_libraries

quiet_libraries()  # before a test imports transformers: commands run in this process too, and print one line to stderr


@pytest.fixture(scope="module")
def ray_started() -> None:
    """A local Ray. Not inside a test: Ray's loggers keep the stderr they first see, and a test's own is closed after it."""
    from jobs.common.cluster import connect

    connect()


@pytest.fixture
def thread_count() -> Iterator[None]:
    """Benchmarks measure one core; the tests after them keep what they had."""
    import torch

    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
