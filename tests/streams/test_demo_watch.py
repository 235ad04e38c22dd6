from __future__ import annotations

import httpx

from streams.demo.watch import WorkerWatch
from streams.settings import Settings


async def test_an_answer_that_is_not_json_leaves_the_last_state() -> None:
    async with httpx.AsyncClient(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>a proxy</html>"))
    ) as http:
        watch = WorkerWatch(Settings.load(), ["http://worker"], "default")
        await watch._http.aclose()
        watch._http = http
        await watch.poll_once()
        assert watch.newest.version == 0
