"""Writes experiences of many models to replay, for the joiner and rebuilds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streams.replay_fit import FitCheck
from streams.replay_store import (
    CHUNK,
    INDEX_S,
    WRITE,
    ReplayKeys,
    ReplayWrite,
    WriteResult,
    decode,
    index_key,
    write_arguments,
)
from streams.trail import Trail

if TYPE_CHECKING:
    import redis.asyncio


@dataclass(frozen=True, slots=True)
class Found:
    """An experience in replay."""

    model_id: str
    version: int
    value: bytes
    """JSON of the `ExperienceEvent`."""


class ReplayWriter:
    """Writes entries of many models in one pipeline, for the joiner's event loop.

    The index of models is written before the entries, so that no entry lacks it after a crash: an index
    without its entry finds nothing, and expires. Evicted ids leave the index with the next writes.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        *,
        prefix: str,
        capacity: int,
        strategies: Collection[str] = (),
        generation: str = "",
        trail: Trail | None = None,
    ) -> None:
        """
        Args:
            strategies: see `FitCheck`.
            trail: notes each write.
        """
        self._client = client
        self._trail = trail
        self._write = client.register_script(WRITE)
        self._prefix = prefix
        self._capacity = capacity
        self._generation = generation
        self._fit = FitCheck(client, prefix, strategies)
        self._evicted: list[bytes] = []

    async def write(self, writes: Sequence[tuple[str, ReplayWrite]]) -> list[WriteResult]:
        """Writes (model_id, write) pairs in one round trip; returns the result of each.

        Raises:
            WritesLost: Redis has lost writes.
        """
        if not writes:
            return []
        unfit = await self._fit.unfit([(model_id, write.value) for model_id, write in writes])
        positions: dict[str, list[int]] = {}
        for i, (model_id, _) in enumerate(writes):
            positions.setdefault(model_id, []).extend([] if i in unfit else [i])
        pipe = self._client.pipeline(transaction=False)
        evicted, self._evicted = self._evicted, []
        for entry_id in evicted:
            pipe.delete(index_key(self._prefix, entry_id.decode()))
        for model_id, write in writes:
            # `pipe.set` checks its arguments for longer than the command takes.
            pipe.execute_command("SET", index_key(self._prefix, write.id), model_id, "EX", INDEX_S)
        if not self._generation:
            pipe.sadd(ReplayKeys(self._prefix, "").models, *positions)
        chunks: list[list[int]] = []
        for model_id, indices in positions.items():
            keys = ReplayKeys(self._prefix, model_id, self._generation)
            for start in range(0, len(indices), CHUNK):
                chunk = indices[start : start + CHUNK]
                arguments = write_arguments(self._capacity, [writes[i][1] for i in chunk])
                await self._write(keys.written, arguments, client=pipe)
                chunks.append(chunk)
        out = [WriteResult.UNFIT] * len(writes)
        number = await self._trail.note(pipe) if self._trail else 0
        answers = await pipe.execute()
        if self._trail:
            self._trail.check(answers.pop(), number)
        for chunk, (results, gone) in zip(chunks, answers[len(answers) - len(chunks) :], strict=True):
            for i, result in zip(chunk, results, strict=True):
                out[i] = WriteResult(result)
            if not self._generation:  # a buffer under construction evicts what the live one may have
                self._evicted += gone
        return out

    async def find(self, wanted: Sequence[tuple[str | None, str]]) -> list[Found | None]:
        """The stored experience of each (model_id, or None if unknown; interaction_id), or None.

        Costs one round trip if all models are given, else two, whatever the number of models.
        """
        if not wanted:
            return []
        unknown = [entry_id for model_id, entry_id in wanted if model_id is None]
        models: dict[str, str] = {}
        if unknown:
            pipe = self._client.pipeline(transaction=False)
            for entry_id in unknown:
                pipe.get(index_key(self._prefix, entry_id))
            found = zip(unknown, await pipe.execute(), strict=True)
            models = {entry_id: name.decode() for entry_id, name in found if name is not None}
        pipe = self._client.pipeline(transaction=False)
        lookups: list[tuple[int, str]] = []
        for i, (model_id, entry_id) in enumerate(wanted):
            name = models.get(entry_id) if model_id is None else model_id
            if name is not None:
                pipe.hget(ReplayKeys(self._prefix, name, self._generation).entries, entry_id)
                lookups.append((i, name))
        out: list[Found | None] = [None] * len(wanted)
        for (i, name), value in zip(lookups, await pipe.execute() if lookups else (), strict=True):
            # A tool's entry has no interaction to amend.
            if value is not None and b'"interaction":' in value:
                out[i] = Found(name, *decode(value))
        return out
