"""Latency of a decision over HTTP, acknowledged by Kafka, with 200 candidate memories.

    python -m benchmarks.inference_latency [--encoder minilm] [--requests 300] [--memories 200] [--json FILE]

Kafka (embedded, or that of `CORTEX_KAFKA`) and one inference worker run in their own processes; this one
sends requests through `CortexClient`, with one and with eight concurrent callers. Cases:

    all cached      message and memory texts are in the cache
    new message     each message is new, the memories are cached: the usual case
    new memory      the message and ten memories are new each time
    embeddings      the message is new, the memories come with embeddings (base64 float16)
    numbers         the same, as JSON lists of numbers, as clients in other languages may send them

Prints milliseconds from call to answer. The parts come from the worker's histograms: encoder, model, Kafka's
acknowledgement. The load average shows how busy the machine was.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from cortex_core.text_encoder import load_encoder
from streams.client.client import CortexClient
from streams.events import new_id
from streams.local.stack import Stack
from streams.settings import Settings

WORDS = (
    *(
        "deploy",
        "release",
        "staging",
        "billing",
        "invoice",
        "refund",
        "queue",
        "database",
        "index",
        "latency",
    ),
    *("memory", "cache", "agent", "customer", "token", "session", "login", "error", "timeout", "migration"),
    *("schema", "backup", "restore", "cluster", "node", "region", "network", "key", "rotation", "audit"),
    *(
        "ticket",
        "report",
        "dashboard",
        "alert",
        "threshold",
        "budget",
        "policy",
        "contract",
        "vendor",
        "review",
    ),
)

Ask = Callable[[], Awaitable[object]]


class Texts:
    """Distinct sentences of twelve words, determined by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._number = itertools.count()

    def new(self) -> str:
        return " ".join(self._random.choices(WORDS, k=12)) + f" number {next(self._number)}"


def cases(
    client: CortexClient, http: httpx.AsyncClient, settings: Settings, count: int, texts: Texts
) -> dict[str, Ask]:
    """A function for each case that sends one request."""
    memories = {f"m-{i}": texts.new() for i in range(count)}
    rows = load_encoder(settings.encoder).encode_many(list(memories.values()))
    vectors = [{"id": id_, "embedding": row} for id_, row in zip(memories, rows, strict=True)]
    numbers = [{"id": v["id"], "embedding": row.tolist()} for v, row in zip(vectors, rows, strict=True)]
    known = texts.new()
    conversations = itertools.count()

    async def ask(message: str, candidates: dict[str, str] | list[dict[str, Any]]) -> None:
        await client.decide(message, conversation_id=f"c-{next(conversations)}", memories=candidates)

    async def with_numbers() -> None:
        body = {"conversation_id": f"c-{next(conversations)}", "message": texts.new(), "memories": numbers}
        (await http.post("/v1/decide", json=body)).raise_for_status()

    return {
        "all cached": lambda: ask(known, memories),
        "new message": lambda: ask(texts.new(), memories),
        "new memory": lambda: ask(
            texts.new(),
            {k: texts.new() if i < 10 else v for i, (k, v) in enumerate(memories.items())},
        ),
        "embeddings": lambda: ask(texts.new(), vectors),
        "numbers": with_numbers,
    }


async def measured(ask: Ask, requests: int, at_once: int) -> dict[str, float]:
    """p50 and p99 in ms, and requests per second, of `at_once` concurrent callers."""
    took: list[float] = []
    left = itertools.count()

    async def caller() -> None:
        while next(left) < requests:
            started = time.perf_counter()
            await ask()
            took.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    seconds = time.perf_counter() - started
    p50, p99 = 1000 * np.percentile(took, [50, 99])
    return {
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "per_s": round(len(took) / seconds),
    }


async def parts(http: httpx.AsyncClient) -> dict[str, tuple[float, int]]:
    """(total seconds, number of calls) of each part in the worker so far."""
    text = (await http.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    names = {
        "encode": "cortex_encode_seconds{}",
        "model": "cortex_model_seconds{}",
        "kafka": 'cortex_publish_seconds{}{{topic="interactions"}}',
    }
    return {
        part: (float(values.get(name.format("_sum"), 0)), int(float(values.get(name.format("_count"), 0))))
        for part, name in names.items()
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "load_average": round(os.getloadavg()[0], 1),
        "memories": arguments.memories,
        "encoder": arguments.encoder,
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load(
            data=Path(folder), topic_prefix=f"bench-{new_id()[-12:]}", encoder=arguments.encoder, port=0
        )
        async with Stack(settings, joiners=0, trainers=0, inference=1, on_event=print) as stack:
            [url] = stack.inference_urls
            async with CortexClient(url) as client, httpx.AsyncClient(base_url=url, timeout=30) as http:
                asking = cases(client, http, settings, arguments.memories, Texts(arguments.seed))
                for name, ask in asking.items():
                    await measured(ask, 20, 1)
                    before = await parts(http)
                    alone = await measured(ask, arguments.requests, 1)
                    after = await parts(http)
                    spent = {
                        f"{part}_ms": round(1000 * (after[part][0] - s) / max(1, after[part][1] - n), 2)
                        for part, (s, n) in before.items()
                    }
                    results["cases"][name] = {
                        "one at a time": alone,
                        "eight at once": await measured(ask, arguments.requests, 8),
                        "mean of each part": spent,
                    }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--memories", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments))
    print(f"load average {results['load_average']}, {results['machine']['cpus']} cpus")
    print(f"{'':12}  {'one at a time':>18}  {'eight at once':>28}  mean of each part")
    print(f"{'ms':12}  {'p50':>8}  {'p99':>8}  {'p50':>8}  {'p99':>8}  {'per s':>8}  encode / model / kafka")
    for name, case in results["cases"].items():
        one, eight, spent = case.values()
        print(
            f"{name:12}  {one['p50_ms']:8.1f}  {one['p99_ms']:8.1f}  {eight['p50_ms']:8.1f}  "
            f"{eight['p99_ms']:8.1f}  {eight['per_s']:8.0f}  "
            f"{spent['encode_ms']:.1f} / {spent['model_ms']:.1f} / {spent['kafka_ms']:.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
