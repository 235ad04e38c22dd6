"""What all worker processes share: logs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import structlog

from streams.settings import Settings
from streams.worker import configure_logs


@pytest.fixture(autouse=True)
def _own_logging() -> object:
    """Restores the logging of the test run."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**before)


def failing(number: int) -> None:
    raise RuntimeError(f"attempt {number}")


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_repeated_error_has_a_traceback_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    configure_logs(Settings.load(data=tmp_path, log_format=log_format))
    ours, library = structlog.get_logger("ours"), logging.getLogger("library")
    for number in range(3):
        try:
            failing(number)
        except RuntimeError as error:
            ours.exception("failed; retrying")
            ours.warning("failed differently", exc_info=error)
            library.error("library failed %d", number, exc_info=True)
    logged = capsys.readouterr().err
    assert logged.count("Traceback") == 3, logged
    assert logged.count("attempt 2") == 2, logged
