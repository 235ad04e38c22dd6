"""Schemathesis: requests made from /openapi.json, valid and invalid, over real HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from streams.settings import Settings
from tests.streams.serving import body, listening


def try_operation(operation: Any, mode: GenerationMode) -> Counter[int]:
    """Sends requests of this kind; counts the statuses."""
    statuses: Counter[int] = Counter()

    @hypothesis_settings(
        max_examples=15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def try_one(case: Any) -> None:
        answer = case.call()
        statuses[answer.status_code] += 1
        case.validate_response(
            answer, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
        )

    try_one()
    return statuses


@pytest.mark.integration
# Schemathesis's own strategies do.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
async def test_no_request_made_from_the_schema_is_answered_5xx_or_other_than_described(
    settings: Settings,
) -> None:
    seen: dict[str, Counter[int]] = {}

    def try_all(url: str) -> None:
        for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
            assert isinstance(found, Ok), found
            operation = found.ok()
            name = f"{operation.method.upper()} {operation.path}"
            seen[name] = sum((try_operation(operation, mode) for mode in GenerationMode), Counter())

    patient = settings.model_copy(update={"publish_timeout_s": 60.0})
    async with listening(patient) as url, httpx.AsyncClient(base_url=url) as http:
        await asyncio.to_thread(try_all, url)
        assert (await http.post("/v1/decide", json=body())).status_code == 200
    assert set(seen) == {"POST /v1/decide", "POST /v1/replies", "GET /v1/models", "GET /v1/models/{model_id}"}
    assert {200, 422} <= set(seen["POST /v1/decide"])
    assert {202, 422} <= set(seen["POST /v1/replies"])
