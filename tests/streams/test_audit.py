from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.audit.compare import MAX_REPLIES, audit
from streams.audit.evidence import Evidence, Experience, Interaction, Published, Reply, Version
from streams.audit.join import LATE_S, join
from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent, parse
from streams.joiner import conversation
from streams.joiner.join import MAX_KEPT
from streams.testing import interaction, reply
from tests.streams.test_join import START, WINDOW, World, event_sets, make_join

Event = InteractionEvent | ReplyEvent
CAPACITY = 10_000
JOIN = make_join()


class Watched:
    """A simulated joiner, and the evidence of the events that it received."""

    def __init__(self) -> None:
        self.world = World(JOIN)
        self.evidence = Evidence(WINDOW, CAPACITY, started=START, grace_s=60.0)

    def see(self, *events: Event) -> Watched:
        for event in events:
            self.world.see(event)
            if isinstance(event, InteractionEvent):
                self.evidence.interactions.append(Interaction.of(event, self.world.now))
            else:
                self.evidence.replies.append(Reply.of(event, self.world.now))
        return self

    def timer(self, now_s: float) -> Watched:
        self.world.timer(now_s)
        return self

    def collect(self, after_s: float = 3 * LATE_S) -> Evidence:
        """The content of the topics and of replay `after_s` later, after all timers."""
        self.world.timer(self.world.now - START + after_s)
        evidence = self.evidence
        evidence.started = self.world.now + 61
        for version, event in enumerate(self.world.published):
            experience = Experience.of(event, version)
            if known := evidence.published.get(experience.key):
                known.add(experience)
            else:
                evidence.published[experience.key] = Published.of(experience)
        for value in self.world.replay.values():
            stored = Experience.of(parse(ExperienceEvent, value), 0)
            evidence.stored[stored.key] = stored
        return evidence


def talk() -> list[Event]:
    """Two interactions with three ratings and one text."""
    events: list[Event] = [interaction("i1", at_s=0), interaction("i2", at_s=100)]
    for n, (names, at_s) in enumerate([("i1", 10), (None, 50), (None, 120)]):
        events.append(reply(f"r{n}", names, at_s=at_s, kind="rating", rating=(-1) ** n * 0.5, text=""))
    return [*events, reply("words", "i2", at_s=130)]


def test_its_limits_equal_those_of_the_joiner() -> None:
    assert (LATE_S, MAX_REPLIES) == (conversation.LATE_S, MAX_KEPT)


def test_a_clean_report_counts_everything() -> None:
    watched = Watched().see(*talk(), *talk()[:3], interaction("silent", at_s=200), reply("never", "i9"))
    report = audit(watched.collect())
    assert report.clean
    assert {k: v for k, v in report.counts.items() if v} == {
        "acknowledged": 8,
        "repeated": 3,
        "joined": 4,
        "orphaned": 1,
        "experiences": 3,
        "amended": 2,
        "expired": 1,
        "republished": 2,
    }
    assert report.models == {"default": {"entries": 3}}


def test_the_joiner_counts_what_the_audit_counts() -> None:
    watched = Watched().see(
        reply("early", "i1", at_s=20, text="ok"), *talk(), *talk()[:3], reply("never", "i9")
    )
    watched.see(interaction("silent", at_s=200), *(reply(f"more{n}", "i2", at_s=140 + n) for n in range(3)))
    watched.see(reply("its own comes late", at_s=1_000, text="ok"), interaction("late", at_s=900))
    watched.see(reply("after the window", "late", at_s=901 + WINDOW))
    counts, counted = audit(watched.collect()).counts, watched.world.totals.counts
    names = ["repeated", "joined", "amended", "late", "orphaned", "moved", "expired"]
    assert {name: counted[name] for name in names} == {name: counts[name] for name in names}
    assert min(counts[name] for name in names) >= 1


def test_events_in_progress_are_pending_and_not_errors() -> None:
    watched = Watched().see(*talk(), interaction("later", at_s=1000), reply("waits", "i9", at_s=1000))
    report = audit(watched.collect(after_s=0))
    assert report.clean
    assert (report.counts["open"], report.counts["waiting"], report.pending) == (1, 1, 2)


def test_an_interaction_that_is_never_closed_is_lost() -> None:
    watched = Watched().see(interaction("i1"))
    evidence = watched.collect(after_s=WINDOW - 2)
    assert audit(evidence).clean
    evidence.started += WINDOW
    assert {f.kind for f in audit(evidence).findings} == {"lost"}


# --- any order and any delays


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_it_agrees_with_the_joiner_if_everything_arrives_in_time(data: st.DataObject) -> None:
    events = data.draw(st.permutations(data.draw(event_sets())))
    evidence = Watched().see(*events).collect()
    assert audit(evidence).findings == []
    joined = join(evidence)
    assert all(a.certain for a in joined.replies if a.candidates)
    mine: dict[str, list[Reply]] = {i.id: [] for i in joined.interactions}
    for assigned in joined.replies:
        if assigned.candidates:
            mine[assigned.candidates[0].id].append(assigned.reply)
    expected = {i: tuple(r.id for r in sorted(rs, key=lambda r: r.order)) for i, rs in mine.items()}
    assert {k[1]: e.reply_ids for k, e in evidence.stored.items()} == expected


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_it_reports_no_error_however_late_events_arrive(data: st.DataObject) -> None:
    events = data.draw(event_sets())
    waits = [0.0, 1.0, WINDOW / 3, WINDOW, WINDOW + 61]
    if data.draw(st.booleans()):
        waits.append(LATE_S)
    else:  # duplicates after more than a day are no longer recognised
        events += data.draw(st.lists(st.sampled_from(events), max_size=4))
    watched, now = Watched(), 0.0
    for event in data.draw(st.permutations(events)):
        now += data.draw(st.sampled_from(waits))
        watched.timer(now).see(event)
    assert audit(watched.collect()).findings == []


# --- injected errors

Inject = Callable[[Evidence, str], None]


def change(evidence: Evidence, interaction_id: str, **changes: Any) -> None:
    """Changes an experience in replay and on the topic."""
    key = ("default", interaction_id)
    evidence.stored[key] = replace(evidence.stored[key], **changes)
    evidence.published[key] = Published.of(evidence.stored[key])


def lose_from_replay(evidence: Evidence, it: str) -> None:
    del evidence.stored["default", it]


def lose_from_topic(evidence: Evidence, it: str) -> None:
    del evidence.published["default", it]


def lose_a_reply(evidence: Evidence, it: str) -> None:
    was = evidence.stored["default", it]
    change(evidence, it, reply_ids=was.reply_ids[1:], rewards=was.rewards[1:])


def double_a_reply(evidence: Evidence, it: str) -> None:
    was = evidence.stored["default", it]
    change(evidence, it, reply_ids=was.reply_ids[:1] + was.reply_ids, rewards=was.rewards[:1] + was.rewards)


def add_a_foreign_reply(evidence: Evidence, it: str) -> None:
    other = next(e for k, e in evidence.stored.items() if k[1] != it)
    was = evidence.stored["default", it]
    change(
        evidence, it, reply_ids=was.reply_ids + other.reply_ids[:1], rewards=was.rewards + other.rewards[:1]
    )


def reverse_the_order(evidence: Evidence, it: str) -> None:
    was = evidence.stored["default", it]
    change(evidence, it, reply_ids=was.reply_ids[::-1], rewards=was.rewards[::-1])


def forge_the_reward(evidence: Evidence, it: str) -> None:
    change(evidence, it, reward=0.123)


def misread_a_rating(evidence: Evidence, it: str) -> None:
    was = evidence.stored["default", it]
    change(evidence, it, rewards=(0.123, *was.rewards[1:]))


def forge_the_features(evidence: Evidence, it: str) -> None:
    change(evidence, it, digest=b"other")


def forge_the_outcome(evidence: Evidence, it: str) -> None:
    change(evidence, it, outcome="no_reply")


def disagree(evidence: Evidence, it: str) -> None:
    was = evidence.stored["default", it]
    evidence.stored["default", it] = replace(was, reward=0.123, aggregation="mean")


def invent(evidence: Evidence, it: str) -> None:
    was = evidence.stored["default", it]
    evidence.stored["default", "invented"] = replace(was, interaction_id="invented")


def commit_without_a_dead_letter(evidence: Evidence, it: str) -> None:
    del it
    evidence.unreadable.append("cortex.replies-0 @7")


ERRORS: dict[Inject, set[str]] = {
    lose_from_replay: {"lost"},
    lose_from_topic: {"lost"},
    lose_a_reply: {"lost"},
    double_a_reply: {"doubled"},
    add_a_foreign_reply: {"wrong"},
    reverse_the_order: {"wrong"},
    forge_the_reward: {"wrong"},
    misread_a_rating: {"wrong"},
    forge_the_features: {"wrong"},
    forge_the_outcome: {"wrong"},
    disagree: {"wrong"},
    invent: {"wrong"},
    commit_without_a_dead_letter: {"lost"},
}


@pytest.mark.parametrize(("inject", "kinds"), ERRORS.items(), ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("turns", [2, 7])
def test_it_finds_every_injected_error(inject: Inject, kinds: set[str], turns: int) -> None:
    assert audit(evidence_of(turns)).clean
    for n in range(turns):
        evidence = evidence_of(turns)
        inject(evidence, f"i{n}")
        report = audit(evidence)
        assert kinds <= {f.kind for f in report.findings}, report.findings
        assert all(report.counts[kind] for kind in kinds)


def evidence_of(turns: int) -> Evidence:
    """A new copy of the evidence of turns with two ratings each, of which one names no interaction."""
    known = _evidence_of(turns)
    return replace(known, stored=dict(known.stored), published=dict(known.published), unreadable=[])


@functools.cache
def _evidence_of(turns: int) -> Evidence:
    events: list[Event] = []
    for n in range(turns):
        events.append(interaction(f"i{n}", at_s=10 * n))
        for k, names in enumerate((f"i{n}", None)):
            rating = 0.5 if (n + k) % 2 else -1.0
            said_s = 10 * n + k + 1
            events.append(reply(f"r{n}-{k}", names, at_s=said_s, kind="rating", rating=rating, text=""))
    return Watched().see(*events).collect()


def test_a_reply_in_two_experiences_is_doubled() -> None:
    evidence = Watched().see(*talk()).collect()
    # It came so late that either experience may contain it, but not both.
    evidence.replies = [
        r if r.id != "r2" else replace(r, arrived=r.arrived + 10 * LATE_S) for r in evidence.replies
    ]
    evidence.started += 20 * LATE_S
    assert audit(evidence).clean
    was, taken = evidence.stored["default", "i1"], evidence.stored["default", "i2"]
    ids, rewards = (*was.reply_ids, "r2"), (*was.rewards, taken.rewards[0])
    change(evidence, "i1", reply_ids=ids, rewards=rewards, reward=rewards[-1])
    assert [(f.kind, f.subject) for f in audit(evidence).findings] == [("doubled", "r2")]


def test_an_older_experience_repeated_by_a_worker_considered_dead_is_no_error() -> None:
    evidence = Watched().see(*talk()).collect()
    known = evidence.published["default", "i1"]
    older = replace(known.newest, version=-1, reply_ids=("r0",), rewards=(0.5,), reward=0.5)
    known.add(older)
    assert audit(evidence).clean
    known.add(known.newest)
    assert audit(evidence).clean
    known.add(replace(older, version=known.newest.version))
    assert [(f.kind, f.subject) for f in audit(evidence).findings] == [("wrong", "i1")]
    known.add(replace(older, version=known.newest.version + 1))
    assert ("lost", "r1") in [(f.kind, f.subject) for f in audit(evidence).findings]


def test_evicted_experiences_are_checked_on_the_topic() -> None:
    evidence = Watched().see(*talk()).collect()
    evidence.capacity = 1
    del evidence.stored["default", "i1"]
    assert audit(evidence).clean
    evidence.published["default", "i1"] = Published.of(
        replace(evidence.published["default", "i1"].newest, reply_ids=("r1",), rewards=(-0.5,))
    )
    assert [(f.kind, f.subject) for f in audit(evidence).findings] == [("lost", "r0")]
    del evidence.published["default", "i1"]
    assert [(f.kind, f.subject) for f in audit(evidence).findings] == [("lost", "i1")]


def test_what_replay_does_not_take_cannot_be_amended_after_its_window() -> None:
    watched = (
        Watched().see(interaction("i1", at_s=0), reply("r1", None, at_s=WINDOW + 200)).timer(WINDOW + 100)
    )
    evidence = watched.see(interaction("i2", at_s=WINDOW + 150)).collect()
    assert evidence.published["default", "i1"].newest.reply_ids == ()
    before = next(e for e in watched.world.published if e.interaction.interaction_id == "i1" and e.reply_ids)
    evidence.published["default", "i1"] = Published.of(Experience.of(before, 1))
    del evidence.stored["default", "i1"]
    assert not audit(evidence).clean
    evidence.misfits.add(("default", "i1"))
    report = audit(evidence)
    assert report.clean, report.findings
    assert report.counts["misfits"] == 1


def test_events_before_retention_or_before_since_are_not_checked() -> None:
    evidence = Watched().see(*talk()).collect()
    evidence.stored.clear()
    evidence.published.clear()
    assert audit(evidence).counts["lost"] == 4
    beyond = audit(evidence, since=START + 50)
    assert (beyond.counts["lost"], beyond.counts["beyond"]) == (2, 1)
    evidence.retained_since = START + 1
    assert (audit(evidence).clean, audit(evidence).counts["beyond"]) == (True, 2)


# --- weights

CHAIN = [Version("m", n, n - 1 or None, 10 * n, {"e-0": 10 * n}) for n in range(1, 8)]


@pytest.mark.parametrize("kept", [CHAIN, CHAIN[3:], [*CHAIN[2:4], *CHAIN[5:]], []])
def test_a_compacted_chain_is_no_fork(kept: list[Version]) -> None:
    report = audit(Evidence(WINDOW, CAPACITY, START, 60.0, versions=kept))
    assert report.clean
    assert report.models == ({"m": {"version": 7, "learned": 70}} if kept else {})


@given(at=st.integers(0, 6), gap=st.integers(0, 3), data=st.data())
def test_every_fork_is_found(at: int, gap: int, data: st.DataObject) -> None:
    fork = data.draw(
        st.sampled_from(
            [
                CHAIN[at],  # the same again
                replace(CHAIN[at], learned=3),
                replace(CHAIN[-1], version=8 + gap, parent=CHAIN[at].parent),
                replace(
                    CHAIN[-1],
                    version=8 + gap,
                    parent=7 + gap,
                    consumed={"e-0": CHAIN[at].consumed["e-0"] - 1},
                ),
                replace(CHAIN[-1], version=8 + gap, parent=8 + gap),
            ]
        )
    )
    other = [replace(v, model_id="other") for v in CHAIN]
    report = audit(Evidence(WINDOW, CAPACITY, START, 60.0, versions=[*CHAIN, *other, fork]))
    assert [f.kind for f in report.findings] == ["fork"]
    assert report.models["m"]["version"] >= 7
