"""Texts to embeddings for many requests at once, off the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from prometheus_client import Counter, Histogram

from cortex_core.arrays import FloatArray
from cortex_core.text_encoder import CachedEncoder, TextEncoder

BATCH = 32
"""Texts in one call of the encoder: long enough to be efficient, short enough that nobody waits for long."""

ENCODE_S = Histogram("cortex_encode_seconds", "One call of the text encoder, for up to 32 texts")
TEXT_CACHE = Counter("cortex_text_cache_total", "Texts asked for, by whether kept or encoded", ["result"])


def rounded(rows: FloatArray) -> FloatArray:
    """float32 numbers that float16 holds exactly: what is logged is then what was decided on."""
    return rows.astype(np.float16).astype(np.float32)


class _Rounding:
    """An encoder whose vectors float16 holds exactly."""

    def __init__(self, inner: TextEncoder) -> None:
        self._inner = inner
        self.dim = inner.dim
        self.name = inner.name

    def encode(self, text: str) -> FloatArray:
        return rounded(self._inner.encode(text))

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        return rounded(self._inner.encode_many(texts))


class Embedder:
    """Texts to vectors: cached, each text once however many requests wait for it, in fair batches.

    Vectors are rounded to what float16 holds, once, when they are encoded.

    While one batch is with the encoder, texts of other requests gather; the next batch takes a text of each
    in turn, so that a request with a thousand uncached memories does not hold the others up.
    """

    def __init__(self, encoder: TextEncoder, capacity: int) -> None:
        self.encoder = CachedEncoder(_Rounding(encoder), capacity)
        self.dim = encoder.dim
        self.name = encoder.name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._lines: deque[deque[str]] = deque()
        self._waiting: dict[str, asyncio.Future[FloatArray]] = {}
        self._drain_task: asyncio.Task[None] | None = None

    async def encode(self, texts: Sequence[str]) -> list[FloatArray]:
        """One (D,) vector for each text."""
        wanted = list(dict.fromkeys(texts))
        found = {text: row for text in wanted if (row := self.encoder.cached(text)) is not None}
        TEXT_CACHE.labels("hit").inc(len(found))
        missing = [text for text in wanted if text not in found]
        if missing:
            TEXT_CACHE.labels("miss").inc(len(missing))
            new = [text for text in missing if text not in self._waiting]
            for text in new:
                self._waiting[text] = asyncio.get_running_loop().create_future()
            if new:
                self._lines.append(deque(new))
            futures = [self._waiting[text] for text in missing]
            if self._drain_task is None or self._drain_task.done():
                self._drain_task = asyncio.create_task(self._drain())
            # A request that is given up must not cancel what another waits for.
            rows = await asyncio.gather(*(asyncio.shield(future) for future in futures))
            found |= zip(missing, rows, strict=True)
        return [found[text] for text in texts]

    def close(self) -> None:
        """Ends the thread; what still waits is cancelled."""
        if self._drain_task is not None:
            self._drain_task.cancel()
        for future in self._waiting.values():
            future.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _drain(self) -> None:
        while batch := self._next_batch():
            try:
                rows: Sequence[FloatArray | Exception] = list(await self._run(batch))
            except Exception:
                rows = [await self._alone(text) for text in batch]
            for text, row in zip(batch, rows, strict=True):
                future = self._waiting.pop(text)
                if isinstance(row, Exception):
                    future.set_exception(row)
                    future.exception()  # whoever waited may be gone
                else:
                    future.set_result(row)

    def _next_batch(self) -> list[str]:
        batch: list[str] = []
        while self._lines and len(batch) < BATCH:
            line = self._lines.popleft()
            batch.append(line.popleft())
            if line:
                self._lines.append(line)
        return batch

    async def _alone(self, text: str) -> FloatArray | Exception:
        """One text of a batch that failed: only the one at fault shall fail."""
        try:
            rows = await self._run([text])
            return np.asarray(rows[0], dtype=np.float32)
        except Exception as error:
            return error

    async def _run(self, batch: list[str]) -> FloatArray:
        loop = asyncio.get_running_loop()
        with ENCODE_S.time():
            return await loop.run_in_executor(self._thread, self.encoder.encode_many, batch)
