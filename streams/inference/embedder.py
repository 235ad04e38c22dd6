"""Encodes the texts of concurrent requests in batches, off the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from prometheus_client import Counter, Histogram

from cortex_core.arrays import FloatArray
from cortex_core.text_encoder import MAX_WINDOWS, CachedEncoder, SentenceTransformerEncoder, TextEncoder

ENCODE_BATCH = 32
"""Texts per call of the encoder: a compromise between throughput and latency. Long texts count for more."""
WINDOW_LETTERS = 1000
"""About as much of a text as an encoder reads at once."""

ENCODE_S = Histogram("cortex_encode_seconds", "Duration of one call of the text encoder, for up to 32 texts")
TEXT_SHORTENED = Counter(
    "cortex_text_shortened_total", "Texts of which the encoder has not read the middle, for their length"
)
TEXT_CACHE = Counter("cortex_text_cache_total", "Texts, by cache hit or miss", ["result"])


def rounded(rows: FloatArray) -> FloatArray:
    """Rounds to float32 numbers that float16 represents exactly, so that what is logged was decided on."""
    return rows.astype(np.float16).astype(np.float32)


class _Rounding:
    """An encoder with rounded results."""

    def __init__(self, inner: TextEncoder) -> None:
        self._inner = inner
        self.dim = inner.dim
        self.name = inner.name

    def encode(self, text: str) -> FloatArray:
        return rounded(self._inner.encode(text))

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        return rounded(self._inner.encode_many(texts))


class Embedder:
    """Encodes texts with a cache, each text once for all requests that wait for it, in fair batches.

    Embeddings are rounded to float16 when they are encoded.

    While a batch is being encoded, the texts of other requests are queued; the next batch takes one text of
    each request in turn, so that a request with a thousand uncached memories does not delay the others.
    """

    def __init__(self, encoder: TextEncoder, capacity: int) -> None:
        self.encoder = CachedEncoder(_Rounding(encoder), capacity)
        self._inner = encoder
        self.dim = encoder.dim
        self.name = encoder.name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._queues: deque[deque[str]] = deque()
        self._waiting: dict[str, asyncio.Future[FloatArray]] = {}
        self._drain_task: asyncio.Task[None] | None = None

    async def encode(self, texts: Sequence[str]) -> list[FloatArray]:
        """One (D,) embedding per text."""
        distinct = list(dict.fromkeys(texts))
        found = {text: row for text in distinct if (row := self.encoder.cached(text)) is not None}
        TEXT_CACHE.labels("hit").inc(len(found))
        missing = [text for text in distinct if text not in found]
        if missing:
            TEXT_CACHE.labels("miss").inc(len(missing))
            new = [text for text in missing if text not in self._waiting]
            for text in new:
                self._waiting[text] = asyncio.get_running_loop().create_future()
            if new:
                self._queues.append(deque(new))
            futures = [self._waiting[text] for text in missing]
            if self._drain_task is None or self._drain_task.done():
                self._drain_task = asyncio.create_task(self._drain())
            # The cancellation of one request must not cancel a text that another one waits for.
            rows = await asyncio.gather(*(asyncio.shield(future) for future in futures))
            found |= zip(missing, rows, strict=True)
        return [found[text] for text in texts]

    def close(self) -> None:
        """Ends the thread and cancels waiting requests."""
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
                rows = [await self._encode_one(text) for text in batch]
            for text, row in zip(batch, rows, strict=True):
                future = self._waiting.pop(text)
                if isinstance(row, Exception):
                    future.set_exception(row)
                    future.exception()  # marks it as retrieved: the request may have been cancelled
                else:
                    future.set_result(row)

    def _next_batch(self) -> list[str]:
        batch: list[str] = []
        size = 0
        while self._queues and size < ENCODE_BATCH:
            queue = self._queues.popleft()
            batch.append(queue.popleft())
            size += 1 + min(len(batch[-1]) // WINDOW_LETTERS, MAX_WINDOWS - 1)
            if queue:
                self._queues.append(queue)
        return batch

    async def _encode_one(self, text: str) -> FloatArray | Exception:
        """Encodes one text of a failed batch, so that only the texts at fault fail."""
        try:
            rows = await self._run([text])
            return np.asarray(rows[0], dtype=np.float32)
        except Exception as error:
            return error

    async def _run(self, batch: list[str]) -> FloatArray:
        loop = asyncio.get_running_loop()
        before = self._shortened()
        with ENCODE_S.time():
            rows = await loop.run_in_executor(self._thread, self.encoder.encode_many, batch)
        TEXT_SHORTENED.inc(self._shortened() - before)
        return rows

    def _shortened(self) -> int:
        return self._inner.shortened if isinstance(self._inner, SentenceTransformerEncoder) else 0
