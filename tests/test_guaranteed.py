"""A guarantee whose test does not run makes a whole run fail."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
from tests.guaranteed import GuaranteedTests

def pytest_configure(config):
    config.pluginmanager.register(GuaranteedTests({"test_promised"}))
"""
OPTIONS = ("-p no:cacheprovider", "-p no:asyncio", "-p no:xdist")
PASSES = "def test_promised(): pass"
SKIPPED = "import pytest\n@pytest.mark.skip\ndef test_promised(): pass"
SKIPPED_ONCE = """
import pytest
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.skip)])
def test_promised(n): pass
"""
EXPECTED_TO_FAIL = "import pytest\n@pytest.mark.xfail\ndef test_promised(): assert False"


@pytest.fixture
def run(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini(f"[pytest]\ntestpaths = .\naddopts = {' '.join(OPTIONS)}")
    pytester.makeconftest(CONFTEST)
    return pytester


def test_a_run_in_which_it_passes_is_good(run: pytest.Pytester) -> None:
    run.makepyfile(test_it=PASSES)
    assert run.inline_run().ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    "source",
    [SKIPPED, SKIPPED_ONCE, EXPECTED_TO_FAIL, "", "def test_promised_too(): pass"],
    ids=["skipped", "skipped once", "expected to fail", "gone", "renamed"],
)
def test_a_whole_run_without_it_fails_and_names_it(run: pytest.Pytester, source: str) -> None:
    run.makepyfile(test_it=source, test_other="def test_other(): pass")
    result = run.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*guarantees without a test that passed*", "test_promised"])


def test_a_run_of_selected_tests_needs_none(run: pytest.Pytester) -> None:
    run.makepyfile(test_it=PASSES, test_other="def test_other(): pass")
    for chosen in (("test_other.py",), ("-k", "other"), ("--deselect", "test_it.py")):
        assert run.inline_run(*chosen).ret == pytest.ExitCode.OK
