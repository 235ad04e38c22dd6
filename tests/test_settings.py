"""Settings in the surroundings in which workers run."""

from __future__ import annotations

import pytest

from cortex_core.errors import ConfigError
from streams.ports import WORKER_PORTS
from streams.settings import Settings
from streams.testing import spawn_worker
from tests.service_links import service_links

NAMES = ["cortex", *(f"cortex-{field.replace('_', '-')}" for field in Settings.model_fields)]


@pytest.mark.parametrize("service", NAMES)
def test_what_kubernetes_injects_for_a_service_of_any_name_is_no_setting(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = Settings.load()
    for name, value in service_links(service).items():
        monkeypatch.setenv(name, value)
    assert Settings.load() == without
    assert Settings.load().of_worker("joiner").port == WORKER_PORTS["joiner"]
    assert Settings.load(port=7000).of_worker("joiner").port == 7000


@pytest.mark.integration
def test_a_worker_starts_beside_a_service_named_cortex(settings: Settings) -> None:
    # On an address of its own, for the port is the default one.
    worker = spawn_worker("joiner", settings, host="127.86.12.3", **service_links("cortex"))
    assert worker.port == WORKER_PORTS["joiner"]


@pytest.mark.parametrize("name", ["CORTEX_JOIN_WINDOW_S", "CORTEX_LR", "CORTEX_PUBLISH_INTERVAL_S"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        Settings.load()
