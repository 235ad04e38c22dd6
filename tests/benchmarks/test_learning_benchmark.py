"""The learning benchmark, small: its JSON, its worlds, and that its baselines are worth comparing with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import learning, sentences, tasks
from benchmarks.replies import BANKS
from benchmarks.tasks import Answer, Settings

SMALL = ["--encoder", "hashing", "--kinds", "6", "--strategies", "3", "--seeds", "1", "--silence", "0.1"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "benchmark-cache"))


def report(tmp_path: Path, *flags: str) -> dict[str, Any]:
    path = tmp_path / "learning.json"
    assert learning.main([*SMALL, *flags, "--json", str(path)]) == 0
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def final(block: dict[str, Any], metric: str) -> dict[str, float]:
    return {name: entry["metrics"][metric]["mean"] for name, entry in block["learners"].items()}


def test_every_bandit_beats_chance_and_none_the_ceiling(tmp_path: Path) -> None:
    plot = tmp_path / "curves.png"
    out = report(tmp_path, "--task", "strategy", "--steps", "300", "--noise", "0", "--plot", str(plot))
    accuracy = final(out["tasks"]["strategy"], "accuracy_final")
    chance, ceiling = accuracy.pop("uniform"), accuracy.pop("full labels")
    assert 0.2 < chance < 0.47
    assert accuracy.keys() >= {"cortex", "LinUCB", "Thompson sampling", "kernel UCB"}
    for name, value in accuracy.items():
        assert chance + 0.1 < value <= ceiling, name
    assert plot.read_bytes().startswith(b"\x89PNG")

    block = out["tasks"]["strategy"]
    ours = block["learners"]["cortex"]
    assert ours["ratio"] == 1.0
    assert set(ours["metrics"]) == {"accuracy_100", "accuracy_300", "accuracy_final", "ece", "brier", "auroc"}
    spread = ours["metrics"]["accuracy_final"]
    assert len(spread["values"]) == 1
    assert spread["mean"] == pytest.approx(np.mean(spread["values"]), abs=1e-3)
    assert len(ours["curve"]["steps"]) == len(ours["curve"]["mean"]) == len(ours["curve"]["std"])
    assert out["settings"]["source"] == "generated"


def test_replies_read_perfectly_are_a_second_block(tmp_path: Path) -> None:
    flags = ("--task", "strategy", "--steps", "600", "--only", "uniform,kernel UCB", "--oracle-replies")
    tasks_ = report(tmp_path, *flags)["tasks"]
    assert set(tasks_) == {"strategy", "strategy_oracle"}
    read, perfect = (final(tasks_[key], "accuracy_final") for key in ("strategy", "strategy_oracle"))
    assert read["uniform"] == perfect["uniform"]
    assert perfect["kernel UCB"] > read["kernel UCB"]


def test_retrieval_by_cosine_beats_chance_and_feedback_beats_cosine() -> None:
    source = learning.Source(None, "hashing")
    settings = Settings(steps=800, kinds=20, memories=80, silence=0.0, noise=0.0, oracle=True)
    precision = {
        name: learning.run(learning.Job("memory", name, 0, settings, source)).precision[-300:].mean()
        for name in ("uniform", "cosine", "bilinear")
    }
    assert precision["uniform"] + 0.03 < precision["cosine"] < precision["bilinear"] - 0.02, precision


def test_confidence_and_switch_report_what_they_promise(tmp_path: Path) -> None:
    confidence = report(tmp_path, "--task", "confidence", "--steps", "100", "--memories", "40")
    ours = confidence["tasks"]["confidence"]["learners"]["cortex"]["metrics"]
    for name in ("ece", "brier", "auroc"):
        assert 0.0 <= ours[name]["mean"] <= 1.0

    switch = report(tmp_path, "--task", "switch", "--steps", "400", "--only", "kernel UCB")
    figures = switch["tasks"]["switch"]["learners"]["kernel UCB"]["metrics"]
    assert 0 < figures["recovery_steps"]["mean"] <= 200
    assert {"unchanged_loss_1000", "unchanged_loss_final", "recovered"} <= figures.keys()


def test_every_ablation_takes_something_away() -> None:
    source = learning.Source(None, "hashing")
    settings = Settings(steps=80, kinds=6, strategies=3, memories=40, silence=0.0)
    confidence = {
        name: learning.run(learning.Job("ablations", name, 0, settings, source)).confidence
        for name in learning.BLOCKS["ablations"].learners
    }
    assert len(confidence) == 5
    whole = confidence.pop("cortex")
    for name, values in confidence.items():
        assert not np.array_equal(values, whole), name


def test_several_processes_report_the_same(tmp_path: Path) -> None:
    flags = ("--task", "strategy", "--steps", "150", "--seeds", "2", "--only", "uniform,kernel UCB")
    alone, together = report(tmp_path, *flags), report(tmp_path, *flags, "--jobs", "2")
    for name, entry in alone["tasks"]["strategy"]["learners"].items():
        assert entry["metrics"] == together["tasks"]["strategy"]["learners"][name]["metrics"]


@pytest.fixture(scope="module")
def made() -> sentences.Sentences:
    texts, kind, area = sentences.generated()
    return sentences.Sentences(
        "generated",
        "hashing-64",
        tuple(texts),
        np.array(kind),
        np.array(area),
        np.eye(64, dtype=np.float32)[np.arange(len(texts)) % 64],
    )


def test_the_world_is_the_same_for_every_learner(made: sentences.Sentences) -> None:
    settings = Settings(steps=300, kinds=10, oracle=True)
    one, other = (tasks.make("strategy", made, settings, 3) for _ in range(2))
    assert [r.text for r in one.requests] == [r.text for r in other.requests]
    assert len({r.text for r in one.requests}) == 300
    for request in one.requests[:50]:
        right = Answer(one.best(request.step))
        assert one.reply(request, right) == other.reply(request, right)
    assert [r.text for r in tasks.make("strategy", made, settings, 4).requests] != [
        r.text for r in one.requests
    ]


def test_users_are_as_silent_and_as_noisy_as_asked(made: sentences.Sentences) -> None:
    settings = Settings(steps=3000, kinds=40, oracle=True, silence=0.3, noise=0.1)
    task = tasks.make("strategy", made, settings, 0)
    told = [task.reply(request, Answer(task.best(request.step))) for request in task.requests]
    explicit = [feedback for feedback in told if feedback is not None and feedback.explicit]
    assert len(explicit) / 3000 == pytest.approx(0.7, abs=0.03)
    assert np.mean([feedback.reward < 0 for feedback in explicit]) == pytest.approx(0.1, abs=0.025)
    assert sum(feedback is None for feedback in told) / 3000 == pytest.approx(0.2, abs=0.03)


def test_close_memories_mislead_and_far_ones_help(made: sentences.Sentences) -> None:
    settings = Settings(steps=300, kinds=40, memories=200)
    task = tasks.make("memory", made, settings, 0)
    assert task.memories is not None
    assert len(task.memories) <= 200
    groups = {frozenset(h) for h in task.helpful}
    assert all(len(h) >= 3 for h in groups)
    assert len(set().union(*groups)) == sum(map(len, groups)), "a memory helps one group only"
    step = task.requests[0]
    helpful = sorted(task.helpful[int(task.kinds[0])])
    assert task.outcome(step, Answer(0, tuple(helpful[:3]))).chance == tasks.MEMORY_CHANCE[3]
    useless = [i for i in range(len(task.memories)) if i not in helpful][:3]
    assert task.outcome(step, Answer(0, tuple(useless))).chance == tasks.MEMORY_CHANCE[0]


def test_a_switch_changes_the_share_of_kinds_it_says(made: sentences.Sentences) -> None:
    task = tasks.make("strategy", made, replace(Settings(steps=300, kinds=40), switch=0.25), 0)
    assert (task.preferred[0] != task.preferred[1]).sum() == 10
    first, last = task.requests[0].step, task.requests[-1].step
    assert task.best(first) == task.preferred[0][task.kinds[first]]
    assert task.best(last) == task.preferred[1][task.kinds[last]]


def test_the_banks_share_no_reply() -> None:
    every = [text for bank in BANKS.values() for text in bank.texts]
    assert len(every) == len(set(every))


def test_too_few_sentences_are_refused(made: sentences.Sentences, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="too few for 3000 steps"):
        tasks.make("strategy", made, Settings(steps=3000, kinds=4), 0)
    with pytest.raises(SystemExit, match="--kinds is 101"):
        tasks.make("strategy", made, Settings(kinds=101), 0)
    with pytest.raises(SystemExit, match="--data expects the folder of CLINC150"):
        sentences.load(tmp_path)
