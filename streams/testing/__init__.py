"""Real servers, worker processes, events and waiting, for tests and benchmarks.

    with kafka_server(folder) as kafka, redis_server(folder) as redis_url:
        settings = Settings.load(kafka=kafka, redis_url=redis_url, data=folder, port=0)
        await send(settings, [interaction("i-1"), reply("r-1", "i-1")])
        joiner = spawn_worker("joiner", settings)
        joiner.wait_ready()
        joiner.stop()

Part of the package, so that users can test their agents with it. It imports no test framework.
"""

from streams.testing.events import T0, at, interaction, reply, send, to_record
from streams.testing.servers import delete_all, kafka_server, redis_server
from streams.testing.waiting import async_wait_for, wait_for
from streams.testing.workers import WorkerProcess, end_spawned, spawn_worker

__all__ = [
    "T0",
    "WorkerProcess",
    "async_wait_for",
    "at",
    "delete_all",
    "end_spawned",
    "interaction",
    "kafka_server",
    "redis_server",
    "reply",
    "send",
    "spawn_worker",
    "to_record",
    "wait_for",
]
