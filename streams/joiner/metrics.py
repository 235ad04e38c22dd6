"""A joiner's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

EVENTS = Counter("cortex_joiner_events_total", "Events read", ["kind"])
OUTCOMES = Counter(
    "cortex_joiner_outcomes_total",
    "Events by outcome: joined, amended, duplicates, late, too_late (replay had evicted the interaction), "
    "waiting, orphans (the interaction never arrived), moved (to the interaction they belong to), excess, "
    "no_reply, conflicts, experiences, timer_failures",
    ["outcome"],
)
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
