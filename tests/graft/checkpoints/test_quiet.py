"""What is printed while weights are converted: errors, and nothing else, also where one conversion needs another."""

import logging

import pytest
from transformers.utils import logging as transformers_logging

from graft.checkpoints.quiet import quiet_conversion


def test_hints_are_hidden_and_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    logger, before = logging.getLogger("bitsandbytes.backends.cpu.ops"), transformers_logging.get_verbosity()
    filters = list(logger.filters)
    with quiet_conversion():
        with quiet_conversion():
            logger.warning("install another package")
        logger.warning("install a third package")
        logger.error("it failed")
    assert caplog.messages == ["it failed"]
    assert (logger.filters, transformers_logging.get_verbosity()) == (filters, before)
