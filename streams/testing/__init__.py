"""What tests and measurements stand on: real servers, real worker processes, events, and waiting.

    with kafka_server(folder) as kafka, redis_server(folder) as redis_url:
        settings = Settings.load(kafka=kafka, redis_url=redis_url, data=folder, port=0)
        await send(settings, [interaction("i-1"), reply("r-1", "i-1")])
        joiner = spawn_worker("joiner", settings)
        joiner.wait_ready()
        joiner.stop()

It ships with the package for whoever tests an agent against it. It imports no test framework.
"""

from streams.testing.events import T0, addressed, at, interaction, reply, send
from streams.testing.servers import forget, kafka_server, redis_server
from streams.testing.waiting import async_wait_for, wait_for
from streams.testing.workers import WorkerProcess, end_spawned, spawn_worker

__all__ = [
    "T0",
    "WorkerProcess",
    "addressed",
    "async_wait_for",
    "at",
    "end_spawned",
    "forget",
    "interaction",
    "kafka_server",
    "redis_server",
    "reply",
    "send",
    "spawn_worker",
    "wait_for",
]
