"""Follows the weights topic: holds the manifests of all models, and reads a payload when it is asked for.

`streams.weights.records` describes the topic, `streams.weights.versions` which versions are valid.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from cortex_core.errors import WeightsError
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.kafka.follower import StateFollower
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.weights.payloads import READ_S, Payloads
from streams.weights.records import StoredVersion, UnusableError
from streams.weights.versions import Versions

log = structlog.get_logger(__name__)

T = TypeVar("T")
Use = Callable[[WeightsSnapshot, bytes], Awaitable[T]]
"""Called with a version's snapshot and its `resume` record; raises `WeightsError` if it cannot be used."""


class WeightsFollower(StateFollower):
    """Follows the versions of every model, and calls back for each change of a newest one.

    A version is refused, and the one before it remains the newest, if its manifest is invalid (see
    `Versions`) or for an embedding that this process does not have; and later, if its payload turns out to be
    incomplete, damaged, forged, not finite, or of another architecture (`use`).

        def changed(model_id): ...
        follower = WeightsFollower(settings, changed)
        await follower.start()
        await follower.until_caught_up()
        model = await follower.use("default", build)
        await follower.stop()
    """

    def __init__(
        self,
        settings: Settings,
        on_change: Callable[[str], None] | None = None,
        *,
        on_state: Callable[[str | None], None] | None = None,
    ) -> None:
        """
        Args:
            on_change: called with each model that has a newer version, or has none any more; not before the
                follower has caught up.
            on_state: called with the reason why Kafka is unavailable, or None if it is available.
        """
        super().__init__(settings, Topics.of(settings).weights, on_state)
        self.versions = Versions(settings, self._check)
        self._on_change = on_change or (lambda _model_id: None)
        self._payloads = Payloads(settings)

    def models(self) -> list[str]:
        """Ids of the models with at least one version."""
        return self.versions.models()

    def newest(self, model_id: str) -> WeightsManifest | None:
        """The manifest of the model's newest valid version; None if it has no version."""
        return self.versions.newest(model_id)

    def history(self, model_id: str) -> list[WeightsManifest]:
        """The last `weights_kept` versions, oldest first: the choices for a rollback or a pin."""
        return self.versions.history(model_id)

    async def stop(self) -> None:
        await super().stop()
        await self._payloads.close()

    async def use(self, model_id: str, use: Use[T], version: int | None = None) -> T | None:
        """Reads a version and hands it to `use`: the newest, or the newest before it that can be used.

        Args:
            version: only this one.

        Returns:
            The result of `use`; None if the model has no usable version.

        Raises:
            WeightsError: this version is not kept, or cannot be used.
            KafkaError, OSError, TimeoutError: the broker does not answer.
        """
        while (stored := self.versions.get(model_id, version)) is not None:
            try:
                return await use(*await self._payloads.read(stored))
            except WeightsError as error:
                if version is not None:
                    raise
                async with asyncio.timeout(READ_S):
                    await self.catch_up()
                if self.versions.get(model_id) == stored:  # else it was overwritten: there is a newer one
                    self._discard(stored, error)
        if version is not None:
            have = ", ".join(str(m.version) for m in self.history(model_id)) or "none"
            raise WeightsError(f"weights {model_id} v{version} are not kept; kept are: {have}")
        return None

    async def fetch(self, model_id: str, version: int) -> WeightsSnapshot:
        """Reads a kept version.

        Raises:
            WeightsError: it is not kept, or damaged.
            KafkaError, OSError, TimeoutError: the broker does not answer.
        """

        async def same(snapshot: WeightsSnapshot, _resume: bytes) -> WeightsSnapshot:
            return snapshot

        snapshot = await self.use(model_id, same, version)
        assert snapshot is not None, "use() raises if the version is not kept"
        return snapshot

    async def _start(self) -> None:
        await super()._start()
        log.info("weights topic read", models=len(self.models()), refused=dict(self.refused))

    async def _add(self, record: Any) -> None:
        changed = self.versions.add(record, len(self._topic.positions))
        if changed is not None and self.caught_up.is_set():
            self._on_change(changed)

    def _check(self, manifest: WeightsManifest) -> None:
        text_dim = manifest.architecture.get("text_dim")
        if text_dim != self.settings.text_dim:
            raise UnusableError(
                f"weights {manifest.model_id} v{manifest.version} are for embeddings of dimension "
                f"{text_dim}, this worker's have {self.settings.text_dim} (CORTEX_TEXT_DIM)"
            )

    def _discard(self, version: StoredVersion, error: WeightsError) -> None:
        reason = getattr(error, "reason", "damaged")
        self._count_refused(reason)
        log.warning("version refused", version=version.name, reason=reason, error=str(error)[:2_000])
        self.versions.discard(version)
