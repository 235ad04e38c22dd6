"""`cortex demo`: the complete system on this machine, with simulated users, measured from outside.

Starts the stack, runs simulated users against the inference service, waits until all replies have been
learned, compares what is stored with what was acknowledged, and stops the stack. It uses the system only
through HTTP, and reads its topics and replay.

The control is the best policy that ignores the request: the memories of an untrained gate (cosine
similarity), served by the same workers for the same requests, and the fixed strategy that was best in
hindsight.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cortex_core.errors import ConfigError, UnavailableError
from cortex_core.evaluation import moving_mean
from streams.client.client import CortexClient
from streams.demo import measures, report
from streams.demo.measures import Tally
from streams.demo.traffic import Traffic
from streams.demo.users import Users
from streams.demo.view import Frame, View
from streams.demo.watch import ExperienceReader, WorkerWatch, end_offsets, ids_logged
from streams.events import new_id
from streams.kafka.topics import Topics
from streams.local.stack import Stack
from streams.replay_store import RedisReplayBuffer
from streams.settings import Settings

RATE = 18.0
"""Interactions per second, each decided by the learning model and by the control; two cores sustain it."""
SECONDS = 90.0
DRAIN_S = 30.0
"""Maximum time to wait, after the last reply, for events in flight."""
DRAIN_INTERRUPTED_S = 2.0
"""The same after Ctrl-C; events still in flight stay in their topics and count as pending."""
FRAME_S = 0.5


def run_demo(
    settings: Settings,
    *,
    seconds: float = SECONDS,
    rate: float = RATE,
    seed: int = 0,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    console: Console | None = None,
) -> report.Summary:
    """Runs the demo until it ends, or until SIGINT or SIGTERM, and prints its summary.

    Args:
        settings: if `kafka` or `redis_url` is None, the embedded server is started, in `data`.
        seconds: duration of the traffic, > 0.
        rate: interactions per second, > 0; a slow machine serves fewer.
        seed: seed of the users; the same seed gives the same requests in the same order.
        json_path: output file of the summary, with the fields of `report.JSON_FIELDS` and others.
        plot_path: output file of the learning curve, a PNG.
        console: console of the live view; None means the terminal, or plain lines on standard output.

    Raises:
        ConfigError: an invalid argument or setting.
        UnavailableError: a server or worker does not start.
    """
    if not (seconds > 0 and rate > 0):
        raise ConfigError(f"the demo expects seconds > 0 and rate > 0, got {seconds} and {rate}")
    if round(seconds * rate) < 1:
        raise ConfigError(f"{seconds} s at {rate} interactions per second give no interaction")
    view = View(console)
    summary, tally = asyncio.run(_run(settings, seconds, rate, seed, view))
    samples = sorted(tally.samples, key=lambda s: s.index)
    report.print_summary(summary, view.console)
    if json_path:
        report.write_json(summary, json_path)
        view.log(f"summary: {json_path}")
    if plot_path and samples:
        report.plot(samples, plot_path)
        view.log(f"learning curve: {plot_path}")
    return summary


async def _run(
    settings: Settings, seconds: float, rate: float, seed: int, view: View
) -> tuple[report.Summary, Tally]:
    async with contextlib.AsyncExitStack() as exits:
        stop = exits.enter_context(_stop_on_signal())
        stack = Stack(settings, on_event=view.log)
        if not await _unless_stopped(exits.enter_async_context(stack), stop):
            raise UnavailableError("stopped before the stack was ready")
        return await _Run(stack.settings, stack.inference_urls, seconds, rate, seed, view, stop).measured()


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set instead of ending the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _unless_stopped(work: Any, stop: asyncio.Event) -> bool:
    """Awaits `work`; if `stop` is set first, cancels it and returns False."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        await task
        return True
    finally:
        stopped.cancel()


@dataclass(slots=True)
class _Run:
    """One run on a running stack."""

    settings: Settings
    urls: Sequence[str]
    seconds: float
    rate: float
    seed: int
    view: View
    stop: asyncio.Event

    async def measured(self) -> tuple[report.Summary, Tally]:
        topics = Topics.of(self.settings)
        # A new model id, so that every run starts untrained.
        model_id = f"demo-{new_id()}"
        before = await end_offsets(self.settings, topics.interactions, topics.replies, topics.dead_letters)
        async with contextlib.AsyncExitStack() as exits:
            client = await exits.enter_async_context(CortexClient(self.urls, settings=self.settings))
            reader = await exits.enter_async_context(ExperienceReader(self.settings, model_id))
            watch = await exits.enter_async_context(WorkerWatch(self.settings, self.urls, model_id))
            traffic = Traffic(Users(self.seed), client, model_id)
            exits.enter_context(self.view.showing())
            live = _Live(self, traffic, reader, watch)
            refresh = asyncio.create_task(live.refresh())
            try:
                begun = time.monotonic()
                await traffic.run(self.seconds, self.rate, self.stop)
                lasted_s = time.monotonic() - begun
                drained = await live.drain()
            finally:
                refresh.cancel()
                await asyncio.gather(refresh, return_exceptions=True)
            live.phase = "auditing"
            live.show()
            await watch.poll_once()
            after = await end_offsets(self.settings, topics.dead_letters)
            dead_letters = sum(end - before[partition] for partition, end in after.items())
            audited = measures.audit(
                traffic.tally,
                reader.seen,
                await self._replay(model_id),
                logged=await ids_logged(self.settings, before, f"{model_id}/"),
                drained=drained or not self.stop.is_set(),
                replay_capacity=self.settings.replay_capacity,
                learned=watch.newest.learned,
            )
        summary = self._summary(traffic, reader, watch, audited, lasted_s=lasted_s, dead_letters=dead_letters)
        return summary, traffic.tally

    async def _replay(self, model_id: str) -> dict[str, int]:
        """Interaction id → revision of every entry in replay."""
        store = RedisReplayBuffer.of(self.settings, model_id)
        return await asyncio.to_thread(lambda: {e.id: e.revision for e in store.entries()})

    def _summary(
        self,
        traffic: Traffic,
        reader: ExperienceReader,
        watch: WorkerWatch,
        audited: measures.Audit,
        *,
        lasted_s: float,
        dead_letters: int,
    ) -> report.Summary:
        tally = traffic.tally
        first, last = measures.spans(tally.samples)
        newest = watch.newest
        versions = [list(worker.versions.values()) for worker in watch.workers]
        latency = measures.reply_to_weights_ms(reader.seen, reader.topic, versions)
        return {
            "interactions": len(tally.interactions),
            "replies": len(tally.replies),
            "joined": audited.joined,
            "duplicates": audited.duplicates,
            "lost": len(audited.lost),
            "dead_letters": dead_letters,
            "updates": newest.updates,
            "versions": newest.version,
            "reward_first": measures.mean(s.reward for s in first),
            "reward_last": measures.mean(s.reward for s in last),
            "reward_control": measures.mean(measures.control_rewards(last)),
            "memory_precision_first": measures.mean(s.precision for s in first),
            "memory_precision_last": measures.mean(s.precision for s in last),
            "ece_last": measures.calibration_error([s.confidence for s in last], [s.satisfied for s in last]),
            "reply_to_weights_ms": {
                "p50": measures.percentile(latency, 50),
                "p99": measures.percentile(latency, 99),
                "max": max(latency, default=None),
                "count": len(latency),
            },
            "seconds": lasted_s,
            # Not part of JSON_FIELDS:
            "memory_precision_control": measures.mean(s.control_precision for s in last),
            "control_strategy": measures.best_fixed(last),
            "ema_loss": newest.ema_loss,
            "errors": tally.errors.total(),
            "error_messages": dict(tally.errors.most_common(5)),
            "redelivered": audited.redelivered,
            "lost_ids": sorted(audited.lost)[:20],
            "pending": len(audited.pending),
            "unlearned": measures.unlearned(reader.seen, reader.topic, versions),
            "interrupted": self.stop.is_set(),
            "seed": self.seed,
            "rate": self.rate,
            "rate_achieved": len(tally.interactions) / lasted_s,
            "model_id": traffic.model_id,
        }


@dataclass(slots=True)
class _Live:
    """The data behind the live view."""

    run: _Run
    traffic: Traffic
    reader: ExperienceReader
    watch: WorkerWatch
    begun: float = 0.0
    phase: str = "running"
    waiting_for: str = ""

    async def refresh(self) -> None:
        """Shows a frame every `FRAME_S`, until cancelled."""
        self.begun = time.monotonic()
        while True:
            self.show()
            await asyncio.sleep(FRAME_S)

    def show(self) -> None:
        self.run.view.show(self._frame())

    async def drain(self) -> bool:
        """Waits until every reply has become an experience and every worker serves weights that include it.

        Returns whether this happened in time.
        """
        self.phase = "draining"
        begun = time.monotonic()
        while time.monotonic() - begun < (DRAIN_INTERRUPTED_S if self.run.stop.is_set() else DRAIN_S):
            await self.watch.poll_once()
            missing = set(self.traffic.tally.replies) - self.reader.reply_ids
            unlearned = measures.unlearned(self.reader.seen, self.reader.topic, self._versions())
            self.waiting_for = f"{len(missing)} replies to join, {unlearned} experiences to learn"
            self.show()  # at least once
            if not missing and not unlearned:
                self.waiting_for = ""
                return True
            await asyncio.sleep(0.2)
        return False

    def _versions(self) -> list[list[measures.VersionSeen]]:
        return [list(worker.versions.values()) for worker in self.watch.workers]

    def _frame(self) -> Frame:
        tally = self.traffic.tally
        samples = sorted(tally.samples, key=lambda s: s.index)
        recent = samples[-200:]
        elapsed_s = time.monotonic() - self.begun
        window = max(10, round(measures.FIRST_SHARE * self.run.seconds * self.run.rate))
        latency = measures.reply_to_weights_ms(self.reader.seen[-300:], self.reader.topic, self._versions())
        p50, p99 = measures.percentile(latency, 50), measures.percentile(latency, 99)
        return Frame(
            phase=self.phase,
            elapsed_s=elapsed_s,
            seconds=self.run.seconds,
            interactions=len(tally.interactions),
            expected=round(self.run.seconds * self.run.rate),
            replies=len(tally.replies),
            joined=len(self.reader.reply_ids & set(tally.replies)),
            errors=tally.errors.total(),
            reward=moving_mean([s.reward for s in samples], window).tolist(),
            control=moving_mean(measures.control_rewards(samples), window).tolist(),
            memory_precision=measures.mean(s.precision for s in recent),
            control_precision=measures.mean(s.control_precision for s in recent),
            ema_loss=self.watch.newest.ema_loss,
            ece=measures.calibration_error([s.confidence for s in recent], [s.satisfied for s in recent]),
            versions={worker.name: worker.version for worker in self.watch.workers},
            events_per_s=tally.events / elapsed_s if elapsed_s > 0 else None,
            latency_ms=(p50, p99) if p50 is not None and p99 is not None else None,
            waiting_for=self.waiting_for,
        )
