"""What an experience must be like to train a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortex_core.errors import InputError
from cortex_core.metadata import METADATA_KEYS
from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry
from cortex_core.requirements import LARGEST, Requirements
from tests.cortex_core.learner_helpers import DIM, SMALL, fresh, unit

REQUIREMENTS = Requirements.of(SMALL.to_dict())


def fitting(name: str = "e", reward: float = 0.8) -> ReplayEntry:
    rng = np.random.default_rng(len(name))
    return ReplayEntry(
        situation_emb=unit(rng),
        memory_indices=[0, 1],
        memory_scores=[0.5, 0.4],
        strategy_id=SMALL.strategies[0],
        confidence=0.5,
        reward=reward,
        id=name,
        message_emb=unit(rng),
        history_emb=unit(rng),
        metadata=np.zeros(len(METADATA_KEYS), np.float32),
        memory_embs=unit(rng, 3),
        propensity=0.5,
        context=[0.0] * 7,
    )


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "another situation": ({"situation_emb": np.zeros(10)}, r"situation_emb has shape \(10,\)"),
    "another message": ({"message_emb": np.zeros(10)}, r"message_emb has shape \(10,\), expected \(32,\)"),
    "another history": ({"history_emb": np.zeros(31)}, "history_emb"),
    "other memories": ({"memory_embs": np.zeros((3, 10))}, "memory_embs"),
    "other memories, of which none was shown": (
        {"memory_embs": np.zeros((3, 10)), "memory_indices": [], "memory_scores": []},
        "memory_embs",
    ),
    "no metadata": ({"metadata": np.zeros(0)}, r"metadata has shape \(0,\), expected \(10,\)"),
    "too much metadata": ({"metadata": np.zeros(11)}, "metadata"),
    "huge metadata": ({"metadata": np.full(10, 1e30)}, "metadata contains"),
    "a short context": ({"context": [0.0] * 6}, "context"),
    "a huge context": ({"context": [0.0] * 6 + [1e300]}, "context contains 1e"),
    "an unknown strategy": ({"strategy_id": "dance"}, "unknown strategy 'dance', expected one of"),
    "a strategy that is no text": ({"strategy_id": ["quick_answer"]}, "unknown strategy"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_every_kind_of_misfit_is_named(kind: str) -> None:
    changes, message = MISFITS[kind]
    with pytest.raises(InputError, match=message):
        REQUIREMENTS.check_entry(replace(fitting(), **changes))


def test_what_is_not_logged_fits() -> None:
    REQUIREMENTS.check_entry(fitting())
    bare = ReplayEntry(np.zeros(DIM, np.float32), [], [], SMALL.strategies[0], 0.5, 1.0)
    REQUIREMENTS.check_entry(bare)


def test_misfits_in_a_buffer_stop_no_step() -> None:
    """Each batch draws them, for they are almost all of the buffer."""
    model, trainer, buffer = fresh(update_every=1)
    for kind, (changes, _) in MISFITS.items():
        buffer.add(replace(fitting(kind), **changes))
    for n in range(20):
        entry = fitting("x" * (n + 1))
        buffer.add(entry)
        update = trainer.observe(entry)
        assert update is not None
        assert not update.skipped
    assert trainer.total_interactions == 20
    assert model.config == SMALL


def test_the_largest_numbers_that_fit_train_finitely() -> None:
    _, trainer, buffer = fresh(update_every=1)
    for n, sign in enumerate((1.0, -1.0) * 5):
        entry = replace(
            fitting(f"e{n}", reward=sign),
            situation_emb=np.full(DIM, LARGEST),
            message_emb=np.full(DIM, sign * LARGEST),
            history_emb=np.full(DIM, LARGEST),
            memory_embs=np.full((3, DIM), -LARGEST),
            metadata=np.full(len(METADATA_KEYS), LARGEST),
            context=[sign * LARGEST] * 7,
        )
        buffer.add(entry)
        update = trainer.observe(entry)
        assert update is not None
        assert not update.skipped
    assert trainer.observe(fitting()) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"situation_emb": {"f32": "!!", "shape": [2]}},
        {"situation_emb": {"f32": "AAAA", "shape": ["x"]}},
        {"situation_emb": {"f32": 7}},
        {"situation_emb": "text"},
        {"context": ["a"]},
        {"context": {"a": 1}},
        {"memory_indices": [1e400]},
        {"memory_scores": None},
        {"confidence": []},
        {"metadata": [[]]},
    ],
    ids=repr,
)
def test_wrong_types_in_stored_entries_are_refused_and_the_rest_is_loaded(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    valid = fitting().to_json()
    with pytest.raises(InputError):
        ReplayEntry.from_json(valid | changes)
    path = tmp_path / "replay.jsonl"
    lines = [json.dumps(valid | changes), json.dumps(valid)]
    path.write_text("\n".join(lines) + "\n")
    assert len(ReplayBuffer(path=path)) == 1
