"""What many models and old versions cost: memory and time until a worker is ready; `cortex control`.

    python -m benchmarks.model_count [--models 1 100 1000] [--versions 40] [--json FILE]

An embedded Kafka and Redis run in their own processes. For each case, versions of all models are in Kafka
before the worker starts: one of each model, or `--versions` of one. Columns:

    ready s      from the start of the process until `/readyz` answers 200
    MB           memory (RSS) then
    first ms     first decision of an inference worker with one of the models
    pause, pin   seconds of `cortex control pause` and `cortex control pin`, with the start of the process
    CPU s        CPU seconds of the latter: what it takes on an idle machine, but for Kafka's answers

A worker is ended when it takes more than `--limit-mb`, or is not ready within `--limit-s`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from aiokafka import AIOKafkaProducer

from cortex_core.model import CortexModel
from cortex_core.weights import WeightsSnapshot
from streams.connections import kafka_client_options
from streams.kafka.topics import MAX_RECORD_BYTES, create_topics
from streams.local.stack import Stack
from streams.settings import Settings
from streams.testing.workers import WorkerProcess, spawn_worker
from streams.weights.architecture import model_config
from streams.weights.records import publish


async def fill(settings: Settings, models: int, versions: int) -> None:
    """Publishes versions 1 … `versions` of models m0, m1, …; 20 in a transaction."""
    await create_topics(settings)
    one = WeightsSnapshot.of(CortexModel.create(model_config(settings)), model_id="m0", version=1)
    producer = AIOKafkaProducer(
        **kafka_client_options(settings),
        transactional_id=f"{settings.topic_prefix}-fill",
        max_request_size=2 * MAX_RECORD_BYTES,
    )
    await producer.start()
    try:
        numbers = [(f"m{m}", v) for m in range(models) for v in range(1, versions + 1)]
        for start in range(0, len(numbers), 20):
            async with producer.transaction():
                for model_id, version in numbers[start : start + 20]:
                    own = {"model_id": model_id, "version": version, "parent": version - 1 or None}
                    await publish(
                        producer, settings, replace(one, manifest=one.manifest.model_copy(update=own))
                    )
    finally:
        await producer.stop()


def started(
    name: str, settings: Settings, limit_mb: float, limit_s: float
) -> tuple[WorkerProcess, dict[str, Any]]:
    """Starts a worker; seconds until it is ready, its memory then, and why it was ended if it was."""
    began = time.monotonic()
    worker = spawn_worker(name, settings)
    while True:
        took, used = time.monotonic() - began, memory_mb(worker.pid)
        if ready(worker):
            return worker, {"ready_s": took, "mb": used, "ended": ""}
        ended = f"> {limit_mb:,.0f} MB" if used > limit_mb else f"> {limit_s:g} s" if took > limit_s else ""
        if ended or not worker.alive:
            worker.kill()
            return worker, {"ready_s": took, "mb": used, "ended": ended or "it ended"}
        time.sleep(0.05)


def ready(worker: WorkerProcess) -> bool:
    try:
        return worker.get("/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def memory_mb(pid: int) -> float:
    """Resident memory of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(found[0]) / 1000 if found else 0.0


def control(settings: Settings, *args: str) -> float:
    """Seconds that `cortex control` takes, as a process."""
    began = time.monotonic()
    command = [sys.executable, "-m", "streams.cli", "control", *args]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | settings.environment())
    return time.monotonic() - began


def measure(settings: Settings, limit_mb: float, limit_s: float) -> dict[str, Any]:
    """One case, whose versions are on the topic."""
    out: dict[str, Any] = {
        "pause_s": control(settings, "pause", "m0"),
        "pin_s": control(settings, "pin", "m0"),
    }
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    control(settings, "pin", "m0")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    out["cpu_s"] = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    for undo in ("unpin", "resume"):
        control(settings, undo, "m0")
    for name in ("inference", "trainer"):
        worker, out[name] = started(name, settings, limit_mb, limit_s)
        if name == "inference" and not out[name]["ended"]:
            began = time.monotonic()
            request = {"conversation_id": "c", "message": "How do I deploy?", "model_id": "m0"}
            httpx.post(f"{worker.url}/v1/decide", json=request, timeout=60.0).raise_for_status()
            out[name]["first_ms"] = 1000 * (time.monotonic() - began)
        worker.stop()
    return out


def shown(worker: dict[str, Any]) -> str:
    if worker["ended"]:
        return f"{'ended: ' + worker['ended']:>16}"
    return f"{worker['ready_s']:>8.1f}{worker['mb']:>8,.0f}"


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    cases = [(models, 1) for models in arguments.models] + [(1, arguments.versions)]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="cortex-models-") as folder:
        options: dict[str, Any] = {"data": Path(folder), "encoder": "hashing", "port": 0}
        async with Stack(Settings.load(**options), joiners=0, trainers=0, inference=0) as stack:
            columns = [f"{name:>8}" for name in ("models", "versions", "ready s", "MB", "first ms")]
            columns += [f"{name:>8}" for name in ("ready s", "MB", "pause s", "pin s", "CPU s")]
            print(f"{'':16}{'inference':^24}{'trainer':^16}{'cortex control':^24}")
            print("".join(columns))
            for models, versions in cases:
                settings = Settings.load(
                    **options,
                    kafka=stack.settings.kafka_address,
                    redis_url=stack.settings.redis_address,
                    topic_prefix=f"m{models}-v{versions}",
                )
                await fill(settings, models, versions)
                limits = arguments.limit_mb, arguments.limit_s
                result = {"models": models, "versions": versions}
                result |= await asyncio.to_thread(measure, settings, *limits)
                results.append(result)
                first = result["inference"].get("first_ms")
                print(
                    f"{models:>8,}{versions:>8}{shown(result['inference'])}"
                    f"{'-' if first is None else f'{first:.0f}':>8}{shown(result['trainer'])}"
                    f"{result['pause_s']:>8.1f}{result['pin_s']:>8.1f}{result['cpu_s']:>8.1f}",
                    flush=True,
                )
    return {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()},
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--versions", type=int, default=40)
    parser.add_argument("--limit-mb", type=float, default=6_000.0)
    parser.add_argument("--limit-s", type=float, default=180.0)
    parser.add_argument("--json", metavar="FILE", type=Path, default=None)
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
