"""Trains `cortex_core/feedback/data/head.safetensors`, the semantic head of the feedback extractor.

    python -m benchmarks.train_feedback_head [--out FILE] [--hold-out WRITER] [--work DIR]

Training data are `data/feedback_train_*.txt`, replies composed of their parts (praise and the next request,
courtesy and a complaint), and augmented replies labelled by a teacher (`feedback_teacher.py`).
`feedback_test.txt` and `feedback_dialogue.txt` are never read. `--hold-out` leaves one writer out and
evaluates on that writer's replies: all settings here were chosen this way. `--work` keeps the training data
for the next run. Takes about 25 minutes on one core, most of it for the teacher.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from benchmarks.feedback_data import POLARITY, WRITERS, Reply, written_by
from benchmarks.feedback_teacher import altered, class_weights, features_of, opinions, tuned, word_vectors
from cortex_core.feedback.semantic import CLASSES, ENCODER, FEATURES, HEAD
from cortex_core.feedback.tokens import MOST, Vocabulary, tokens
from cortex_core.text_encoder import SentenceTransformerEncoder

TAUGHT, HIDDEN, CHANNELS, WORD_DIM = 2, 192, 192, 56
"""Number and sizes of the ensemble members that see words and learn from the teacher."""
PLAIN_HIDDEN = 512
"""Hidden size of the member without words, trained on the labels only: its errors are less correlated."""
EPOCHS, PLAIN_EPOCHS, BATCH, RATE, DECAY = 10, 15, 256, 2e-3, 2e-2
COMPOSED, ALTERED = 5_000, 30_000
TEMPERATURE = 0.85
"""Temperature of the logits (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 9), fitted on
held-out writers."""
BASIS = 128
LEAST_SHARE = 0.47
"""Minimum share of the squared norm in the first `BASIS` directions. Nearly every sentence has more;
embeddings of other encoders have about a third."""


def composed(replies: Sequence[Reply], count: int, seed: int) -> list[Reply]:
    """Replies composed of two parts of `replies`, with the label that the parts imply."""
    rng = random.Random(seed)
    by_label = {label: [r.text for r in replies if r.label == label] for label in CLASSES}
    short_praise = [t for t in by_label["positive"] if len(t.split()) <= 3 and t[:1].isalpha()]
    thanks = ["Thanks", "Thank you", "thanks", "Thank you very much", "Thx", "Cheers", "Many thanks"]
    requests = [t for t in by_label["neutral"] if len(t.split()) >= 4 and "\n" not in t]
    complaints = [t for t in by_label["negative"] if len(t.split()) >= 3 and "\n" not in t]
    misses = [*complaints, *by_label["correction"], *by_label["confusion"]]

    def lower(text: str) -> str:
        return text if text[:2] in ("I ", "I'") else text[:1].lower() + text[1:]

    def clean(text: str) -> str:
        return text.rstrip(".!? ")

    out: list[Reply] = []
    label_of = {r.text: r.label for r in replies}
    for _ in range(count):
        kind = rng.randrange(9)
        miss = rng.choice(misses)
        request = rng.choice(requests)
        praise = rng.choice(by_label["positive"])
        if kind == 0:
            text, label = f"{clean(praise)}. {request}", "positive"
        elif kind == 1:
            text, label = f"{clean(rng.choice(short_praise))}, {lower(request)}", "positive"
        elif kind == 2:
            text, label = f"{rng.choice(thanks)}, but {lower(miss)}", label_of[miss]
        elif kind == 3:
            text, label = f"{clean(request)}. {rng.choice(thanks)}!", "neutral"
        elif kind == 4:
            text, label = f"{clean(rng.choice(complaints))}. {request}", "negative"
        elif kind == 5:
            text, label = (
                f"{clean(rng.choice(short_praise))}, but {lower(rng.choice(complaints))}",
                "negative",
            )
        elif kind == 6:
            text, label = f"{rng.choice(thanks)}. {praise}", "positive"
        elif kind == 7:
            text, label = f"{clean(request)}. {rng.choice(by_label['neutral'])}", "neutral"
        else:
            text, label = (
                f"{clean(miss)}. {rng.choice(('Please', 'pls', 'Try again', 'Again'))}",
                label_of[miss],
            )
        out.append(Reply(text, label))
    return out


def known_words(texts: Sequence[str]) -> list[str]:
    """The vocabulary: whole words of the encoder, of VADER's lexicon (words only) and of `texts`."""
    import vaderSentiment.vaderSentiment as vader  # noqa: PLC0415 - needs the extra `bench`

    pieces = SentenceTransformerEncoder()._model.tokenizer.get_vocab()
    listed = (Path(vader.__file__).parent / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    valued = {line.partition("\t")[0] for line in listed}
    plain = {word for word in {*pieces, *valued} if word.isascii() and word.isalpha() and word.islower()}
    return sorted(plain | {word for text in texts for word in tokens(text)[0]})


@dataclass(frozen=True)
class Lessons:
    """Training data of the heads: n written and composed replies, then m augmented ones."""

    texts: list[str]
    """n + m"""
    x: torch.Tensor
    """(n + m, D) embeddings"""
    opinion: torch.Tensor
    """(n + m, C) the teacher's logits"""
    words: list[str]
    vectors: torch.Tensor
    """(V, D) the teacher's vectors of the words"""


def lessons(replies: Sequence[Reply], seed: int, kept: Path | None) -> Lessons:
    """Trains the teacher on `replies` and labels the training data with it, or loads them from `kept`."""
    if kept is None or not kept.exists():
        composing = composed(replies, COMPOSED, seed)
        teacher = tuned([*replies, *composing[: COMPOSED // 5]], seed)
        texts = [r.text for r in [*replies, *composing]]
        texts += altered([r.text for r in replies], ALTERED, seed)
        words = known_words([r.text for r in replies])
        arrays = {
            "x": SentenceTransformerEncoder().encode_many(texts),
            "opinion": opinions(teacher, texts).numpy(),
            "vectors": word_vectors(teacher, words),
            "texts": np.frombuffer("\0".join(texts).encode(), np.uint8),
            "words": np.frombuffer("\0".join(words).encode(), np.uint8),
        }
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(arrays, kept)
    else:
        arrays = load_file(kept)
    return Lessons(
        arrays["texts"].tobytes().decode().split("\0"),
        torch.from_numpy(arrays["x"]),
        torch.from_numpy(arrays["opinion"]),
        arrays["words"].tobytes().decode().split("\0"),
        torch.from_numpy(arrays["vectors"]),
    )


def table_of(lesson: Lessons) -> torch.Tensor:
    """(V + 2, WORD_DIM) principal components of the word vectors, with unit variance, after two zero rows.

    The components are computed on the words that the texts use. Rounded to int8 steps, as they are shipped.
    """
    used = {word for text in lesson.texts for word in tokens(text)[0]}
    unit = nn.functional.normalize(lesson.vectors, dim=1)
    unit = unit - unit.mean(0)
    in_use = torch.tensor([i for i, word in enumerate(lesson.words) if word in used])
    _, _, directions = torch.linalg.svd(unit[in_use], full_matrices=False)
    table = unit @ directions[:WORD_DIM].T
    table = table / table.std()
    steps = table.abs().amax() / 127
    return torch.cat([torch.zeros(2, table.shape[1]), torch.round(table / steps) * steps])


class Member(nn.Module):
    """One network of the ensemble. Inputs: embedding, pattern features and, with a table of word vectors, a
    convolution over three words with max pooling."""

    def __init__(self, dim: int, table: torch.Tensor | None) -> None:
        super().__init__()
        self.table = table
        hidden = PLAIN_HIDDEN if table is None else HIDDEN
        self.of_embedding = nn.Linear(dim, hidden)
        self.of_features = nn.Linear(FEATURES, hidden, bias=False)
        if table is not None:
            self.windows = nn.Conv1d(table.shape[1], CHANNELS, 3, padding=1)
            self.of_windows = nn.Linear(CHANNELS, hidden, bias=False)
        self.output = nn.Linear(hidden, len(CLASSES))

    def forward(self, x: torch.Tensor, f: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(n, D), (n, FEATURES), (n, MOST) rows of the table, to (n, C) logits."""
        hidden = self.of_embedding(4.0 * x) + self.of_features(f)
        if self.table is not None:
            there = rows > 0
            if self.training:
                rows = torch.where(there & (torch.rand(rows.shape) < 0.08), 1, rows)
            words = nn.functional.dropout(self.table[rows], 0.2, self.training)
            windows = torch.relu(self.windows(words.transpose(1, 2))).masked_fill(~there.unsqueeze(1), 0.0)
            hidden = hidden + self.of_windows(nn.functional.dropout(windows.amax(2), 0.2, self.training))
        rate = 0.6 if self.table is None else 0.4
        logits: torch.Tensor = self.output(nn.functional.dropout(torch.relu(hidden), rate, self.training))
        return logits


def rows_of(texts: Sequence[str], vocabulary: Vocabulary) -> torch.Tensor:
    """(n, MOST) vocabulary rows of each text's words, padded."""
    out = np.zeros((len(texts), MOST), np.int64)
    for i, text in enumerate(texts):
        rows = vocabulary.rows(tokens(text)[0])
        out[i, : len(rows)] = rows
    return torch.from_numpy(out)


def fit(lesson: Lessons, labels: dict[str, str], table: torch.Tensor | None, seed: int) -> Member:
    """Trains one member with AdamW.

    Without a table of word vectors the targets are the labels. With one they are the mean of label and
    teacher, or the teacher where there is no label. Features and embeddings are dropped at random, so that
    the network does not rely on one of them.
    """
    torch.manual_seed(seed)
    taught, epochs = table is not None, PLAIN_EPOCHS if table is None else EPOCHS
    y = torch.tensor([CLASSES.index(labels[t]) if t in labels else -1 for t in lesson.texts])
    labelled = y >= 0
    target = torch.softmax(lesson.opinion, 1)
    smooth = 0.95 * nn.functional.one_hot(y.clamp(min=0), len(CLASSES)) + 0.05 / len(CLASSES)
    target[labelled] = (0.5 * (target + smooth) if taught else smooth)[labelled]
    weight = torch.full((len(y),), 0.7)
    weight[labelled] = class_weights(y[labelled])[y[labelled]]
    used = torch.arange(len(y)) if taught else torch.nonzero(labelled).squeeze(1)
    f, rows = features_of(lesson.texts), rows_of(lesson.texts, Vocabulary(lesson.words))
    member = Member(lesson.x.shape[1], table)
    optimizer = torch.optim.AdamW(member.parameters(), lr=RATE, weight_decay=DECAY)
    steps = epochs * -(-len(used) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.split(used[torch.randperm(len(used))], BATCH):
            noisy = lesson.x[batch] + 0.02 * torch.randn(len(batch), lesson.x.shape[1])
            x = nn.functional.dropout(noisy, 0.1) * (torch.rand(len(batch), 1) > 0.1)
            logits = member(x, f[batch] * (torch.rand(len(batch), 1) > 0.15), rows[batch])
            loss = -(weight[batch, None] * target[batch] * torch.log_softmax(logits, 1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return member.eval()


def export(members: Sequence[Member], lesson: Lessons, out: Path) -> None:
    """Writes the ensemble as one wide network, taught members first, and the encoder's basis."""
    m = len(members)
    _, _, vh = torch.linalg.svd(lesson.x[:4000], full_matrices=False)
    taught = [k for k in members if k.table is not None]
    table = taught[0].table
    assert table is not None
    step = float(table.abs().max()) / 127
    wide = {
        "embedding_weight": torch.cat([4.0 * k.of_embedding.weight.T for k in members], 1),
        "feature_weight": torch.cat([k.of_features.weight.T for k in members], 1),
        "hidden_bias": torch.cat([k.of_embedding.bias for k in members]),
        "window_weight": torch.cat(
            [k.windows.weight.permute(2, 1, 0).reshape(-1, CHANNELS) * step for k in taught], 1
        ),
        "window_bias": torch.cat([k.windows.bias for k in taught if k.windows.bias is not None]),
        "channel_weight": torch.stack([k.of_windows.weight.T for k in taught]),
        "output_weight": torch.cat([k.output.weight.T for k in members], 0) / (m * TEMPERATURE),
        "output_bias": torch.stack([k.output.bias for k in members]).mean(0) / TEMPERATURE,
        "basis": vh[:BASIS].T.contiguous(),
    }
    arrays = {name: value.detach().numpy().astype(np.float16) for name, value in wide.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            **arrays,
            "words": np.frombuffer(" ".join(lesson.words).encode(), np.uint8),
            "word_vectors": torch.round(table / step).to(torch.int8).numpy(),
        },
        out,
        metadata={"classes": ",".join(CLASSES), "encoder": ENCODER, "least_share": f"{LEAST_SHARE}"},
    )
    print(f"{out.name}: {out.stat().st_size / 1e6:.2f} MB, {m} members, {len(lesson.words)} words")


@torch.no_grad()
def measure(members: Sequence[Member], lesson: Lessons, replies: Sequence[Reply]) -> None:
    """Prints the accuracy on held-out replies, and the temperature that fits them best."""
    texts = [r.text for r in replies]
    x = torch.from_numpy(SentenceTransformerEncoder().encode_many(texts))
    f, rows = features_of(texts), rows_of(texts, Vocabulary(lesson.words))
    logits = torch.stack([member(x, f, rows) for member in members]).mean(0)
    y = torch.tensor([CLASSES.index(r.label) for r in replies])
    scan = np.geomspace(0.3, 4.0, 80)
    losses = [float(nn.functional.cross_entropy(logits / t, y)) for t in scan]
    p = torch.softmax(logits, 1)
    three = torch.stack([p[:, 0], p[:, 4], p[:, 1:4].sum(1)], 1)
    read, truth = 1 - three.argmax(1), torch.tensor([POLARITY[r.label] for r in replies])
    f1 = [
        2 * ((read == s) & (truth == s)).sum() / ((read == s).sum() + (truth == s).sum()) for s in (1, 0, -1)
    ]
    print(
        f"held out: polarity macro-F1 {torch.stack(f1).mean():.3f}, "
        f"opposite {(read * truth < 0).float().mean():.3f}, temperature {scan[int(np.argmin(losses))]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="output file; default: the shipped file, with --hold-out none"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--hold-out", type=int, default=0, help="number of the held-out writer, from 1; 0 for none"
    )
    parser.add_argument("--work", type=Path, help="folder that keeps the training data")
    args = parser.parse_args()
    torch.set_num_threads(1)

    replies = [r for w in range(1, WRITERS + 1) if w != args.hold_out for r in written_by(w)]
    replies = list({r.text.lower(): r for r in replies}.values())
    random.Random(args.seed).shuffle(replies)
    kept = args.work / f"lessons-{args.hold_out}.safetensors" if args.work else None
    lesson = lessons(replies, args.seed, kept)
    labels = {r.text: r.label for r in [*composed(replies, COMPOSED, args.seed), *replies]}
    print(f"{len(replies)} replies, {len(lesson.texts)} with composed and altered ones", flush=True)

    tables = [*[table_of(lesson)] * TAUGHT, None]
    members = [fit(lesson, labels, table, args.seed + i) for i, table in enumerate(tables)]
    if args.hold_out:
        measure(members, lesson, written_by(args.hold_out))
    if args.out or not args.hold_out:
        export(members, lesson, args.out or HEAD)


if __name__ == "__main__":
    main()
