"""Contract suites: one per port, run on every adapter."""

import pytest

pytest.register_assert_rewrite("tests.contracts.replay_store_contract")
