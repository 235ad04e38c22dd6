"""Makes `cortex_core/data/feedback_head.safetensors`: the semantic head of the feedback reader.

    python -m benchmarks.train_feedback_head [--out FILE]

It learns from `data/feedback_train.txt` and from replies composed of its parts (praise and the next request,
courtesy and a complaint). `feedback_test.txt` and `feedback_dialogue.txt` are never read.
An ensemble of two-layer networks on frozen embeddings and pattern features; the temperature (Guo et al. 2017,
"On Calibration of Modern Neural Networks", eq. 9) comes from a part held out of the training replies.
A few minutes on one core.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from benchmarks.feedback_data import Reply, load
from cortex_core.feedback_patterns import read
from cortex_core.feedback_semantic import CLASSES, ENCODER, FEATURES, HEAD, pattern_features
from cortex_core.replay_buffer import FloatArray
from cortex_core.text_encoder import load_encoder

MEMBERS, HIDDEN = 4, 64
EPOCHS, BATCH, RATE, DECAY = 30, 128, 3e-3, 2e-2
SHARES = {"positive": 1.0, "negative": 0.6, "correction": 0.35, "confusion": 0.3, "neutral": 1.0}
"""How much each class weighs in the loss, however many replies were written: the three that complain together
weigh little more than praise."""
BASIS = 128
LEAST_SHARE = 0.47
"""Nearly every sentence has more of itself in the first `BASIS` directions; a vector of another encoder has
about a third."""


def composed(replies: Sequence[Reply], count: int, seed: int) -> list[Reply]:
    """Replies of two parts, with the label that the parts imply, out of `replies` alone."""
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


def varied(text: str, rng: random.Random) -> str:
    """The same reply as a hastier person types it."""
    roll = rng.random()
    if roll < 0.3:
        return text.lower().rstrip(".!")
    if roll < 0.4:
        return text.replace("'", "")
    if roll < 0.5:
        return text.rstrip(".") + "!"
    return text


def inputs(
    replies: Sequence[Reply], embeddings: dict[str, FloatArray]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, D) embeddings, (n, FEATURES) features and (n,) classes."""
    x = np.stack([embeddings[r.text] for r in replies])
    f = np.stack([pattern_features(*read(r.text)) for r in replies])
    y = np.array([CLASSES.index(r.label) for r in replies])
    return torch.from_numpy(x), torch.from_numpy(f), torch.from_numpy(y)


class Member(nn.Module):
    """One network of the ensemble."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_embedding = nn.Linear(dim, HIDDEN)
        self.of_features = nn.Linear(FEATURES, HIDDEN, bias=False)
        self.output = nn.Linear(HIDDEN, len(CLASSES))

    def forward(self, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """(n, D), (n, FEATURES) to (n, C) logits."""
        hidden = torch.relu(self.of_embedding(4.0 * x) + self.of_features(f))
        logits: torch.Tensor = self.output(nn.functional.dropout(hidden, 0.4, self.training))
        return logits


def fit(x: torch.Tensor, f: torch.Tensor, y: torch.Tensor, seed: int) -> Member:
    """Adam with decoupled decay; now and then a row's features or some of its embedding are hidden, so that
    neither is leaned on alone."""
    torch.manual_seed(seed)
    member = Member(x.shape[1])
    optimizer = torch.optim.AdamW(member.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    shares = torch.tensor([SHARES[label] for label in CLASSES])
    weight = shares / torch.bincount(y, minlength=len(CLASSES)) * len(y) / shares.sum()
    loss_of = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.05)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(y)), BATCH):
            seen = (torch.rand(len(rows), 1) > 0.15).float()
            noisy = x[rows] + 0.02 * torch.randn(len(rows), x.shape[1])
            loss = loss_of(member(nn.functional.dropout(noisy, 0.1), f[rows] * seen), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return member.eval()


@torch.no_grad()
def logits_of(members: Sequence[Member], x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """(n, C) mean logits."""
    return torch.stack([member(x, f) for member in members]).mean(0)


def temperature_of(logits: torch.Tensor, y: torch.Tensor) -> float:
    """The temperature with the least cross-entropy, by a scan."""
    scan = np.geomspace(0.3, 4.0, 80)
    losses = [float(nn.functional.cross_entropy(logits / t, y)) for t in scan]
    return float(scan[int(np.argmin(losses))])


def export(members: Sequence[Member], temperature: float, x: torch.Tensor, out: Path) -> None:
    """Writes the ensemble as one wide network, with the basis by which foreign embeddings are known."""
    m = len(members)
    _, _, vh = torch.linalg.svd(x[:4000], full_matrices=False)
    basis = vh[:BASIS].T.contiguous()
    share = ((x @ basis) ** 2).sum(1)
    below = float((share < LEAST_SHARE).float().mean())
    arrays = {
        "embedding_weight": torch.cat([4.0 * k.of_embedding.weight.T for k in members], 1),
        "feature_weight": torch.cat([k.of_features.weight.T for k in members], 1),
        "hidden_bias": torch.cat([k.of_embedding.bias for k in members]),
        "output_weight": torch.cat([k.output.weight.T for k in members], 0) / (m * temperature),
        "output_bias": torch.stack([k.output.bias for k in members]).mean(0) / temperature,
        "basis": basis,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().numpy().astype(np.float16) for name, value in arrays.items()},
        out,
        metadata={"classes": ",".join(CLASSES), "encoder": ENCODER, "least_share": f"{LEAST_SHARE}"},
    )
    size = f"{out.stat().st_size / 1000:.0f} KB, {m} members, temperature {temperature:.2f}"
    print(f"{out.name}: {size}; {below:.2%} of the sentences are below the least share")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HEAD)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rng = random.Random(args.seed)
    written = list({r.text.lower(): r for r in load("train")}.values())
    rng.shuffle(written)
    held_out, kept = written[: len(written) // 7], written[len(written) // 7 :]

    def corpus(replies: Sequence[Reply], count: int) -> list[Reply]:
        more = composed(replies, count, args.seed)
        hasty = [Reply(varied(r.text, rng), r.label) for r in replies]
        return list({r.text: r for r in [*replies, *hasty, *more]}.values())

    fitting, checking, everything = corpus(kept, 2500), corpus(held_out, 250), corpus(written, 2500)
    texts = sorted({r.text for r in [*fitting, *checking, *everything]})
    encoder = load_encoder("minilm")
    embeddings = dict(zip(texts, encoder.encode_many(texts), strict=True))
    print(f"{len(written)} replies {dict(Counter(r.label for r in written))}, {len(texts)} with variants")

    first = [fit(*inputs(fitting, embeddings), args.seed + i) for i in range(2)]
    x, f, y = inputs(checking, embeddings)
    logits = logits_of(first, x, f)
    temperature = temperature_of(logits, y)
    right = (logits.argmax(1) == y).float().mean()
    print(f"held out of training: {right:.3f} accurate over five classes")

    x, f, y = inputs(everything, embeddings)
    export([fit(x, f, y, args.seed + i) for i in range(MEMBERS)], temperature, x, args.out)


if __name__ == "__main__":
    main()
