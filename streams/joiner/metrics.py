"""What a joiner counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

EVENTS = Counter("cortex_joiner_events_total", "Events read", ["kind"])
OUTCOMES = Counter(
    "cortex_joiner_outcomes_total",
    "What became of events: joined, amended, duplicates, late, too_late (replay had let it go), waiting, "
    "orphans (their interaction never came), moved (to their own interaction), excess, no_reply, conflicts, "
    "experiences",
    ["outcome"],
)
DEAD_LETTERS = Counter("cortex_joiner_dead_letters_total", "Records that could not be read", ["topic"])
RETRIES = Counter("cortex_joiner_retries_total", "Attempts that failed because Kafka or Redis did not answer")
LAG = Gauge("cortex_joiner_lag", "Events written and not yet committed", ["topic", "partition"])
BATCH_S = Histogram(
    "cortex_joiner_batch_seconds",
    "From taking a batch up to its committed offsets",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0),
)


def count(counts: Mapping[str, int]) -> None:
    """Counts what happened, by the names of `Changes`."""
    for name, n in counts.items():
        if name in ("interactions", "replies"):
            EVENTS.labels(name).inc(n)
        elif n:
            OUTCOMES.labels(name).inc(n)
