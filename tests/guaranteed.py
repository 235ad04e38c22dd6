"""A whole run fails unless every test that a document names as its evidence has run and passed in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("docs/guarantees.md", "SECURITY.md")


def named_tests(document: str) -> set[str]:
    """Names of the tests in a document, such as `test_this`."""
    return set(re.findall(r"`(test_\w+)`", (ROOT / document).read_text(encoding="utf-8")))


class GuaranteedTests:
    """The plugin. It checks nothing in a run of selected tests."""

    def __init__(self, named: set[str]) -> None:
        self.named = named
        self.passed: set[str] = set()
        self.skipped: set[str] = set()
        """Also those of which only some parameters were skipped, and expected failures."""

    @property
    def without(self) -> list[str]:
        """Named tests that have not run, or not in full."""
        return sorted(self.named - self.passed | self.named & self.skipped)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # "folder/file.py::test_this[parameters]@group of xdist"
        name = re.split(r"[\[@]", report.nodeid.rpartition("::")[2])[0]
        if report.skipped:
            self.skipped.add(name)
        elif report.when == "call" and report.passed:
            self.passed.add(name)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if is_whole(session.config) and self.without and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        if is_whole(config) and self.without:
            terminalreporter.section("guarantees without a test that passed")
            for name in self.without:
                terminalreporter.line(name)


def is_whole(config: pytest.Config) -> bool:
    """Whether a run has all tests of the project."""
    chosen = ("keyword", "markexpr", "deselect", "lf", "collectonly")
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not any(
        config.getoption(name, None) for name in chosen
    )
