"""A trainer's Prometheus metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from cortex_core.online.update import OnlineUpdate
    from cortex_core.weights import WeightsManifest

MODELS_NAMED = 100
"""Models with their own time series; the others share the label "other", which limits its cardinality."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The metrics of one trainer."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.experiences = Counter(
            "cortex_trainer_experiences",
            "Experiences read, by outcome",
            ["model_id", "outcome"],
            registry=registry,
        )
        self.updates = Counter("cortex_trainer_updates", "Gradient steps", ["model_id"], registry=registry)
        self.skipped = Counter(
            "cortex_trainer_skipped",
            "Gradient steps skipped because they were not finite",
            ["model_id"],
            registry=registry,
        )
        self.rollbacks = Counter(
            "cortex_trainer_rollbacks", "Versions published by a rollback", ["model_id"], registry=registry
        )
        self.versions = Counter(
            "cortex_trainer_versions", "Versions published", ["model_id"], registry=registry
        )
        self.version = Gauge("cortex_trainer_version", "Newest version", ["model_id"], registry=registry)
        self.ema_loss = Gauge(
            "cortex_trainer_ema_loss", "Moving average of the loss", ["model_id"], registry=registry
        )
        self.refused = Counter(
            "cortex_trainer_refused",
            "Refused experiences, rollbacks and versions, by kind",
            ["kind"],
            registry=registry,
        )
        self.misfits = Counter(
            "cortex_trainer_misfits",
            "Experiences that did not fit their model: now dead letters, and not in replay",
            ["model_id"],
            registry=registry,
        )
        self.misfits_of: dict[str, int] = {}
        """The same, for `/readyz`."""
        self.fenced = Counter(
            "cortex_trainer_fenced", "Partitions lost to another trainer", registry=registry
        )
        self.failures = Counter(
            "cortex_trainer_failures", "Partitions opened again after a failure", registry=registry
        )
        self.lag = Gauge("cortex_trainer_lag", "Experiences not yet read", ["partition"], registry=registry)
        self.step_seconds = Histogram(
            "cortex_trainer_step_seconds", "One gradient step", buckets=_SECONDS, registry=registry
        )
        self.flush_seconds = Histogram(
            "cortex_trainer_flush_seconds",
            "Final gradient steps and snapshots before publishing",
            buckets=_SECONDS,
            registry=registry,
        )
        self.publish_seconds = Histogram(
            "cortex_trainer_publish_seconds",
            "One Kafka transaction of weights and offsets",
            buckets=_SECONDS,
            registry=registry,
        )
        self._named: set[str] = set()

    def learned(self, model_id: str, outcome: str, update: OnlineUpdate | None, seconds: float) -> None:
        """Counts one experience; `update` if it completed a gradient step."""
        self.experiences.labels(self._label(model_id), outcome).inc()
        if update is not None:
            self.stepped(model_id, update, seconds)

    def stepped(self, model_id: str, update: OnlineUpdate, seconds: float) -> None:
        """Counts one gradient step, taken or skipped."""
        label = self._label(model_id)
        self.step_seconds.observe(seconds)
        (self.skipped if update.skipped else self.updates).labels(label).inc()

    def misfit(self, model_id: str, number: int = 1) -> None:
        """Counts experiences that did not fit their model."""
        label = self._label(model_id)
        self.misfits.labels(label).inc(number)
        if number:
            self.misfits_of[label] = self.misfits_of.get(label, 0) + number

    def published(self, manifest: WeightsManifest) -> None:
        """Counts one published version."""
        label = self._label(manifest.model_id)
        self.versions.labels(label).inc()
        if manifest.reason == "rollback":
            self.rollbacks.labels(label).inc()
        if label != "other":
            self.version.labels(label).set(manifest.version)
            if manifest.ema_loss is not None:
                self.ema_loss.labels(label).set(manifest.ema_loss)

    def _label(self, model_id: str) -> str:
        if model_id not in self._named and len(self._named) < MODELS_NAMED:
            self._named.add(model_id)
        return model_id if model_id in self._named else "other"
