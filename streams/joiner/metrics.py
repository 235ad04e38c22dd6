"""A joiner's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

EVENTS = Counter("cortex_joiner_events_total", "Events read", ["kind"])
OUTCOME_NAMES = {
    "repeated": "events that were processed before, also those read again after a crash or a rebalance",
    "joined": "replies added to an experience",
    "amended": "of these: those to an interaction that had a reply already",
    "late": "of these: those that occurred or arrived after their interaction's window",
    "waited": "replies that arrived before their interaction",
    "orphaned": "replies whose interaction did not arrive in time",
    "moved": "replies assigned to another interaction, because their own arrived after them",
    "excess": "replies above the maximum of an interaction",
    "expired": "interactions whose window closed without a reply",
    "too_late": "amendments of experiences that replay had evicted",
    "experiences": "records sent to the experiences topic",
    "forgotten": "events of forgotten conversations and models: not joined",
    "conflicts": "conversations that another joiner had changed: joined again",
    "timer_failures": "conversations that could not be closed: tried again later",
}
"""Outcome → description. Those that an audit counts too have the name it gives them (docs/operations.md)."""
OUTCOMES = Counter("cortex_joiner_outcomes_total", "Events by outcome", ["outcome"])
for _name in OUTCOME_NAMES:
    OUTCOMES.labels(_name)  # so that what has not happened is 0 and not absent
DEAD_LETTERS = Counter("cortex_joiner_dead_letters_total", "Records that could not be joined", ["topic"])
RETRIES = Counter(
    "cortex_joiner_retries_total", "Attempts that failed because Kafka or Redis was unavailable"
)
RESTORED = Counter(
    "cortex_joiner_restored_total", "Events that were joined again because Redis had lost their effects"
)
EXPIRED = Counter(
    "cortex_joiner_expired_total",
    "Events that were not joined, or whose effects Redis has lost, and that their topic no longer holds",
    ["topic"],
)
LAG = Gauge(
    "cortex_joiner_lag", "Events in the topic that are not joined and committed yet", ["topic", "partition"]
)
BATCH_S = Histogram(
    "cortex_joiner_batch_seconds",
    "Time from receiving a batch to committing its offsets",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0),
)


def count(counts: Mapping[str, int]) -> None:
    """Adds counts of events (see `Changes.counts`) to the metrics."""
    for name, n in counts.items():
        if name in ("interactions", "replies"):
            EVENTS.labels(name).inc(n)
        elif n:
            OUTCOMES.labels(name).inc(n)
