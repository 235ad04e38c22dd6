"""The teacher of the semantic head: the sentence encoder, fine-tuned to classify replies. Not shipped.

Knowledge distillation as in Tang et al. (2019, "Distilling Task-Specific Knowledge from BERT into Simple
Neural Networks"): a small network learns more from the teacher's logits on many altered replies than from the
labels only.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from benchmarks.feedback_data import CLASSES, Reply
from cortex_core.arrays import FloatArray
from cortex_core.feedback.patterns import read
from cortex_core.feedback.semantic import FEATURES, pattern_features
from cortex_core.feedback.tokens import tokens
from cortex_core.text_encoder import SentenceTransformerEncoder

EPOCHS, BATCH, RATE, LENGTH = 2, 64, 1.5e-4, 48
SHARES = {"positive": 1.0, "negative": 0.6, "correction": 0.35, "confusion": 0.3, "neutral": 1.0}
"""Total weight of each class in the loss, independent of its number of replies."""


def class_weights(y: torch.Tensor) -> torch.Tensor:
    """(C,) weights of the classes of `y` (n,) by `SHARES`; their mean over `y` is 1."""
    shares = torch.tensor([SHARES[label] for label in CLASSES])
    return shares / torch.bincount(y, minlength=len(CLASSES)) * len(y) / shares.sum()


def features_of(texts: Sequence[str]) -> torch.Tensor:
    """(n, FEATURES) pattern features of each text."""
    return torch.from_numpy(np.stack([pattern_features(*read(text)) for text in texts]))


class Teacher(nn.Module):
    """The encoder's transformer, and a network over its mean, its maximum and the pattern features."""

    def __init__(self, encoder: SentenceTransformerEncoder) -> None:
        super().__init__()
        transformer = encoder._model[0]
        self.tokenizer = transformer.tokenizer
        self.transformer = transformer.auto_model
        for parameter in self.transformer.embeddings.parameters():
            parameter.requires_grad = False
        dim = self.transformer.config.hidden_size
        self.of_features = nn.Linear(FEATURES, 64)
        self.hidden = nn.Linear(2 * dim + 64, 192)
        self.output = nn.Linear(192, len(CLASSES))

    def encoded(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, D) mean and (n, D) maximum over each text's word pieces."""
        pieces = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        states = self.transformer(**pieces).last_hidden_state
        mask = pieces["attention_mask"].unsqueeze(2)
        mean = (states * mask).sum(1) / mask.sum(1)
        return mean, states.masked_fill(mask == 0, -1e4).amax(1)

    def forward(self, texts: Sequence[str], features: torch.Tensor) -> torch.Tensor:
        """n texts and (n, FEATURES) to (n, C) logits."""
        seen = torch.cat([*self.encoded(texts), torch.relu(self.of_features(features))], 1)
        dropped = nn.functional.dropout(seen, 0.2, self.training)
        hidden = torch.relu(self.hidden(dropped))
        logits: torch.Tensor = self.output(nn.functional.dropout(hidden, 0.2, self.training))
        return logits


def tuned(replies: Sequence[Reply], seed: int) -> Teacher:
    """Fine-tunes a teacher on labelled replies; about ten minutes for 17,000 on one core."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    teacher = Teacher(SentenceTransformerEncoder()).train()
    texts = [r.text for r in replies]
    f = features_of(texts)
    y = torch.tensor([CLASSES.index(r.label) for r in replies])
    of_transformer = [p for p in teacher.transformer.parameters() if p.requires_grad]
    known = {id(p) for p in teacher.transformer.parameters()}
    of_head = [p for p in teacher.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW([{"params": of_transformer}, {"params": of_head}], weight_decay=0.01)
    batches = len(y) // BATCH + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [RATE, 1e-3], total_steps=EPOCHS * batches, pct_start=0.1
    )
    loss_of = nn.CrossEntropyLoss(weight=class_weights(y), label_smoothing=0.05)
    lengths = np.array([len(text) for text in texts])
    for epoch in range(EPOCHS):
        start = time.monotonic()
        # Batches of similar lengths need little padding; the noise shuffles them.
        order = np.array_split(np.argsort(lengths + 6.0 * rng.normal(size=len(y))), batches)
        for i in rng.permutation(batches):
            rows = order[i]
            seen = (torch.rand(len(rows), 1) > 0.2).float()
            loss = loss_of(teacher([texts[j] for j in rows], f[rows] * seen), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"teacher: epoch {epoch + 1} of {EPOCHS}, {time.monotonic() - start:.0f} s", flush=True)
    return teacher.eval()


@torch.no_grad()
def opinions(teacher: Teacher, texts: Sequence[str]) -> torch.Tensor:
    """(n, C) logits of the teacher."""
    f = features_of(texts)
    out = torch.zeros(len(texts), len(CLASSES))
    for rows in np.array_split(np.argsort([len(text) for text in texts]), len(texts) // 128 + 1):
        out[rows] = teacher([texts[j] for j in rows], f[rows])
    return out


@torch.no_grad()
def word_vectors(teacher: Teacher, words: Sequence[str]) -> FloatArray:
    """(n, D) embeddings of single words by the fine-tuned encoder."""
    parts = [teacher.encoded(words[i : i + 256])[0] for i in range(0, len(words), 256)]
    vectors: FloatArray = torch.cat(parts).numpy()
    return vectors


def altered(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Up to `count` augmented texts: with words replaced by similar ones, cut, joined, or with words dropped.

    They need not make sense: the teacher labels them.
    """
    rng = random.Random(seed)
    often = Counter(word for text in texts for word in tokens(text)[0] if word.isalpha())
    words = sorted(word for word, times in often.items() if times >= 2 and len(word) > 2)
    vectors = SentenceTransformerEncoder().encode_many(words)
    like = {
        word: [words[j] for j in row[1:13]]
        for word, row in zip(words, np.argsort(-(vectors @ vectors.T), axis=1)[:, :13], strict=True)
    }

    def alter(text: str) -> str:
        parts = text.split()
        roll = rng.random()
        if len(parts) < 3 or roll < 0.45:
            for i, part in enumerate(parts):
                bare = part.strip(".,!?").lower()
                if bare in like and rng.random() < 0.35:
                    parts[i] = part.lower().replace(bare, rng.choice(like[bare]))
        elif roll < 0.65:
            start = rng.randrange(len(parts) - 2)
            parts = parts[start : start + rng.randint(2, len(parts) - start)]
        elif roll < 0.85:
            other = rng.choice(texts).split()
            parts = parts[: rng.randint(1, len(parts))] + other[rng.randint(0, max(len(other) - 1, 0)) :]
        else:
            parts = [part for part in parts if rng.random() > 0.2] or parts
        return " ".join(parts)[:200]

    known = set(texts)
    made = dict.fromkeys(alter(rng.choice(texts)) for _ in range(count))
    return [text for text in made if text and text not in known]
