"""Sentences of known kinds (intents), and their embeddings: CLINC150 if its folder is given, else generated.

CLINC150: Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction",
EMNLP 2019, CC BY 3.0; `data_full.json.gz` and `domains.json` in one folder. Not part of this project.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cortex_core.arrays import FloatArray
from cortex_core.text_encoder import load_encoder

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sentences:
    """n sentences; each belongs to one kind, each kind to one area."""

    source: str
    encoder: str
    """text encoder of the embeddings"""
    texts: tuple[str, ...]
    kind: Ints
    """(n,) 0 … kinds − 1; determines the hidden preference"""
    area: Ints
    """(kinds,) 0 … areas − 1"""
    embeddings: FloatArray
    """(n, D) unit rows"""

    @property
    def kinds(self) -> int:
        """Number of kinds."""
        return len(self.area)

    @property
    def areas(self) -> int:
        """Number of areas."""
        return int(self.area.max()) + 1


def clinc150(folder: Path) -> tuple[list[str], list[int], list[int]]:
    """(texts, kind of each, area of each kind) of the training part of CLINC150.

    Raises:
        SystemExit: the folder does not contain it.
    """
    data, domains = folder / "data_full.json.gz", folder / "domains.json"
    if not data.is_file() or not domains.is_file():
        raise SystemExit(
            f"{folder} does not contain {data.name} and {domains.name}; --data expects the folder of CLINC150"
        )
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows: list[tuple[str, str]] = json.load(file)["train"]
    areas: dict[str, list[str]] = json.loads(domains.read_text("utf-8"))
    area_of = {intent: number for number, name in enumerate(sorted(areas)) for intent in areas[name]}
    intents = sorted({intent for _, intent in rows})
    number_of = {intent: number for number, intent in enumerate(intents)}
    return [t for t, _ in rows], [number_of[i] for _, i in rows], [area_of[i] for i in intents]


# fmt: off
_OBJECTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "billing": (("invoice", "bill", "monthly statement"), ("refund", "money back", "reimbursement"),
                ("payment card", "credit card", "card on file"), ("discount code", "voucher", "coupon"),
                ("tax form", "VAT receipt", "tax statement")),
    "access": (("password", "login", "passphrase"), ("two-factor code", "security code", "one-time code"),
               ("user role", "permission", "access level"), ("account", "profile", "user account"),
               ("VPN", "remote access", "company network connection")),
    "hardware": (("laptop", "notebook", "work computer"), ("printer", "printer on the second floor",
    "copier"),
                 ("headset", "headphones", "microphone"), ("monitor", "second screen", "display"),
                 ("docking station", "dock", "USB hub")),
    "data": (("database", "customer table", "SQL server"), ("spreadsheet", "Excel sheet", "workbook"),
             ("sales report", "quarterly figures", "revenue report"), ("backup", "nightly backup",
              "archive copy"),
             ("dashboard", "chart of signups", "metrics page")),
    "travel": (("flight", "plane ticket", "flight to Lisbon"), ("hotel room", "hotel", "place to stay"),
               ("rental car", "car", "hire car"), ("visa", "travel permit", "entry papers"),
               ("train seat", "rail ticket", "train to Lyon")),
    "people": (("holiday request", "vacation days", "time off"), ("job interview", "candidate call",
    "screening call"),
               ("salary", "pay", "payslip"), ("training course", "workshop", "class"),
               ("parental leave", "maternity leave", "leave for the baby")),
    "code": (("unit test", "test suite", "failing test"), ("pull request", "code review", "merge request"),
             ("build", "CI job", "pipeline"), ("memory leak", "crash in the service", "segfault"),
             ("API key", "access token", "client secret")),
    "kitchen": (("coffee machine", "espresso maker", "coffee maker"), ("lunch order", "catering",
    "sandwich order"),
                ("fridge", "refrigerator", "freezer"), ("dishwasher", "dish washer", "sink"),
                ("birthday cake", "cake", "party food")),
}
_ACTIONS: tuple[tuple[str, ...], ...] = (
    ("I want to cancel my {}", "please drop the {}", "get rid of the {}", "stop my {}",
     "how do I call off the {}"),
    ("my {} does not work", "something is wrong with the {}", "there is a problem with my {}",
     "the {} is broken", "the {} stopped working this morning"),
    ("how much does the {} cost", "what is the price of the {}", "what do I pay for the {}",
     "is the {} expensive", "what will the {} cost me"),
    ("where is my {}", "I cannot find the {}", "I lost my {}", "have you seen the {}",
     "the {} has gone missing"),
    ("I need a new {}", "can I get another {}", "please order one more {}", "set up a {} for me",
     "I would like to have a {}"),
    ("change my {}", "update the {}", "I have to move the {}", "edit my {}", "can you correct the {}"),
)
_OPENERS = ("", "", "hi, ", "hello there, ", "quick one: ", "hey, ", "sorry to bother you, ", "morning, ",
            "so, ")
_CLOSERS = ("", "", "", " please", " today", " before the meeting", " for my colleague", " again",
            ", it is urgent", " by Friday", " as soon as you can", " if that is possible")
# fmt: on


GENERATED_KINDS = 100
SENTENCES_PER_KIND = 100


def generated() -> tuple[list[str], list[int], list[int]]:
    """(texts, kind of each, area of each kind) of combinations of objects and actions; deterministic."""
    things = [(area, names) for area, group in enumerate(_OBJECTS.values()) for names in group]
    pairs = list(itertools.product(things, _ACTIONS))
    rng = np.random.default_rng(0)
    texts: list[str] = []
    kind_of: list[int] = []
    area_of: list[int] = []
    for kind, place in enumerate(rng.choice(len(pairs), GENERATED_KINDS, replace=False)):
        (area, names), phrasings = pairs[place]
        area_of.append(area)
        own = {
            f"{opener}{phrasing.format(name)}{closer}"
            for opener, phrasing, name, closer in itertools.product(_OPENERS, phrasings, names, _CLOSERS)
        }
        texts.extend(str(text) for text in rng.permutation(sorted(own))[:SENTENCES_PER_KIND])
        kind_of.extend([kind] * SENTENCES_PER_KIND)
    return texts, kind_of, area_of


def load(
    data: Path | None, *, encoder: str = "minilm", note: Callable[[str], None] = lambda message: None
) -> Sentences:
    """Sentences with their embeddings.

    Args:
        data: the folder of CLINC150; None generates sentences.
        encoder: argument of `cortex_core.text_encoder.load_encoder`.
        note: called with progress messages.
    """
    texts, kind, area = generated() if data is None else clinc150(data)
    return Sentences(
        source="generated" if data is None else "CLINC150",
        encoder=encoder,
        texts=tuple(texts),
        kind=np.array(kind),
        area=np.array(area),
        embeddings=embed(texts, encoder, note=note),
    )


def some_kinds(sentences: Sentences, count: int, rng: np.random.Generator) -> tuple[Sentences, FloatArray]:
    """The sentences of `count` random kinds, renumbered, and the embeddings of the other sentences."""
    if not 2 <= count <= sentences.kinds:
        raise SystemExit(f"--kinds is {count}, expected 2 to {sentences.kinds} for {sentences.source}")
    kept = rng.choice(sentences.kinds, count, replace=False)
    number = np.full(sentences.kinds, -1)
    number[kept] = np.arange(count)
    chosen = number[sentences.kind] >= 0
    rows = np.flatnonzero(chosen)
    return Sentences(
        source=sentences.source,
        encoder=sentences.encoder,
        texts=tuple(sentences.texts[i] for i in rows),
        kind=number[sentences.kind[rows]],
        area=np.unique(sentences.area[kept], return_inverse=True)[1],
        embeddings=sentences.embeddings[rows],
    ), sentences.embeddings[~chosen]


def embed(
    texts: Sequence[str], encoder: str = "minilm", *, note: Callable[[str], None] = lambda message: None
) -> FloatArray:
    """(n, D) embeddings, cached on disk: a sentence encoder takes milliseconds per text."""
    digest = hashlib.sha256("\0".join([encoder, *texts]).encode()).hexdigest()[:20]
    path = cache_folder() / f"{digest}.npy"
    if path.is_file():
        rows: FloatArray = np.load(path)
        return rows
    note(f"embedding {len(texts):,} sentences with {encoder}, once")
    rows = load_encoder(encoder).encode_many(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.npy")
    np.save(partial, rows)
    partial.replace(path)
    return rows


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cortex/benchmarks`, else under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cortex" / "benchmarks"
