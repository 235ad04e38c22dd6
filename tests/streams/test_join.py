from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.feedback_collector import Aggregation, FeedbackCollector
from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent, parse
from streams.joiner.conversation import LATE_S, Conversation
from streams.joiner.decode import StoredExperience, decode_experience, decode_interaction, decode_reply
from streams.joiner.join import Changes, Join
from streams.testing import T0, at, interaction, reply

WINDOW = 1800.0
START = T0.timestamp()


def make_join(**changes: Any) -> Join:
    options: dict[str, Any] = {
        "window_s": WINDOW,
        "aggregation": "last",
        "collector": FeedbackCollector(),
    }
    return Join(**options | changes)


def stored(conversation: Conversation) -> dict[bytes, bytes]:
    return {name.encode(): value for name, value in conversation.fields(whole=True)[0].items()}


@dataclass
class World:
    """The join with a dictionary as replay, called as the joiner calls it."""

    join: Join = field(default_factory=make_join)
    conversation: Conversation = field(default_factory=Conversation)
    replay: dict[str, bytes] = field(default_factory=dict)
    published: list[ExperienceEvent] = field(default_factory=list)
    totals: Changes = field(default_factory=Changes)
    now: float = START
    version: int = 1

    def see(self, event: InteractionEvent | ReplyEvent) -> World:
        changes, work = Changes(), self.conversation.copy()
        if isinstance(event, InteractionEvent):
            received = decode_interaction(event.to_bytes(), store_text=self.join.store_text)
            self.join.on_interaction(work, received, self.now, changes)
        else:
            [reply] = self.join.read([decode_reply(event.to_bytes())])
            self.join.on_reply(work, reply, self.now, changes)
        return self._apply(work, changes)

    def timer(self, now_s: float) -> World:
        changes, work = Changes(), self.conversation.copy()
        self.now = max(self.now, START + now_s)
        self.join.on_timer(work, START + now_s, changes)
        return self._apply(work, changes)

    def _apply(self, work: Conversation, changes: Changes) -> World:
        work.stamp(self.version)
        self.version += 1
        # Encode and decode it, so that nothing depends on state that is not stored.
        self.conversation = Conversation.load(stored(work))
        for it in changes.closed:
            if it.id not in self.replay:
                self._write(it.id, self.join.experience(it, it.body or b"", ()))
        for interaction_id in self.conversation.pending:
            it = self.conversation.interactions[interaction_id]
            kept = self._kept(it.id)
            if it.body is not None and not self.conversation.replies_of(it):
                self.replay.pop(it.id, None)
            elif it.body is not None or kept is not None:
                body = it.body or bytes(kept.interaction if kept else b"")
                self._write(it.id, self.join.experience(it, body, self.conversation.replies_of(it)))
        self.conversation.pending.clear()
        for late in changes.orphans:
            kept = self._kept(late.interaction_id or "")
            amended = kept and self.join.amended(kept, [late])
            if amended and late.interaction_id:
                self._write(late.interaction_id, amended)
            changes.counts["orphaned"] += not kept
        self.totals.counts.update(changes.counts)
        return self

    def _kept(self, entry_id: str) -> StoredExperience | None:
        return decode_experience(self.replay[entry_id]) if entry_id in self.replay else None

    def _write(self, entry_id: str, value: bytes) -> None:
        if self.replay.get(entry_id) != value:
            self.replay[entry_id] = value
            self.published.append(parse(ExperienceEvent, value))

    def experience(self, interaction_id: str) -> ExperienceEvent:
        return parse(ExperienceEvent, self.replay[interaction_id])

    def count(self, name: str) -> int:
        return self.totals.counts[name]


THUMBS_DOWN: dict[str, Any] = {"kind": "rating", "rating": -1.0, "text": ""}


def test_a_reply_completes_its_interaction_immediately() -> None:
    it = interaction("i1")
    world = World().see(it)
    assert not world.replay
    world.see(reply("r1", "i1", at_s=5))
    got = world.experience("i1")
    feedback = FeedbackCollector().extract("Thanks, that worked!")
    assert (got.revision, got.outcome, got.reward) == (1, "reply", feedback.reward)
    assert got.reward_confidence == feedback.confidence
    assert got.occurred_at == it.occurred_at
    assert got.replied_at == at(5)
    assert got.reply_ids == ["r1"]
    assert got.aggregation == "last"
    assert got.extractor == feedback.extractor
    assert got.interaction.to_bytes() == it.to_bytes()
    assert [(s.type, s.evidence) for s in got.signals] == [(s.type, "") for s in feedback.signals]


def test_a_reply_may_arrive_before_its_interaction() -> None:
    world = World().see(reply("r1", "i1", at_s=5)).see(reply("r2", at_s=6))
    assert (world.count("waited"), world.count("joined"), world.replay) == (2, 0, {})
    world.see(interaction("i1"))
    assert world.experience("i1").reply_ids == ["r1", "r2"]
    assert world.count("joined") == 2


def test_a_later_reply_amends_the_same_experience() -> None:
    world = World().see(interaction("i1")).see(reply("r1", "i1", at_s=5))
    world.see(reply("r2", "i1", at_s=9, **THUMBS_DOWN))
    got = world.experience("i1")
    assert (got.revision, got.reward, got.reply_ids) == (2, -1.0, ["r1", "r2"])
    assert [e.revision for e in world.published] == [1, 2]
    assert world.count("amended") == 1


@pytest.mark.parametrize(
    ("how", "reward", "confidence"),
    [
        ("first", 0.4, 1.0),
        ("last", 0.2, 1.0),
        ("mean", 0.0, 1.0),
        ("min", -0.6, 1.0),
        ("max", 0.4, 1.0),
        ("sum", 0.0, 1.0),
    ],
)
def test_rewards_are_aggregated_as_configured_in_order_of_time(
    how: Aggregation, reward: float, confidence: float
) -> None:
    world = World(make_join(aggregation=how)).see(interaction("i1"))
    for second, rating in ((3, 0.2), (2, -0.6), (1, 0.4)):
        world.see(reply(f"r{second}", "i1", at_s=second, kind="rating", rating=rating, text=""))
    got = world.experience("i1")
    assert got.reward == pytest.approx(reward)
    assert got.reward_confidence == confidence
    assert got.aggregation == how
    assert [r.reward for r in got.readings] == [0.4, -0.6, 0.2]


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ([-1.0, "ok. How do I rotate the certificate?"], -1.0),
        (["That is completely wrong!", "ok"], -0.5),
        ([1.0, "next: list the open tickets"], 1.0),
        (["Thanks, that worked!", "and what about staging?"], 0.9),
        (["Thanks, that worked!", -1.0], -1.0),
        ([-1.0, 1.0], 1.0),
        ([0.4, "Perfect!"], 0.4),  # the rating says how much
        (["That is wrong!", 0.4], 0.4),
        ([1.0, "No, that is wrong."], -0.5),
        ([-1.0, "That is wrong!", "Thanks, that worked!", "ok"], 0.9),
        ([-1.0, "Thanks, that worked!", "No, that is wrong."], -0.5),
        (["ok", "and what about staging?"], 0.1),
    ],
)
@pytest.mark.parametrize("how", ["first", "last", "mean", "min", "max", "sum"])
def test_what_says_nothing_of_the_answer_takes_the_place_of_nothing(
    said: list[str | float], reward: float, how: Aggregation
) -> None:
    events: list[InteractionEvent | ReplyEvent] = [interaction("i1")]
    for n, what in enumerate(said):
        rating: dict[str, Any] = {"kind": "rating", "rating": what, "text": ""}
        events.append(
            reply(f"r{n}", "i1", at_s=n + 1, **({"text": what} if isinstance(what, str) else rating))
        )
    got = set()
    for arrivals in itertools.permutations(events) if len(events) < 5 else [events, events[::-1]]:
        world = World(make_join(aggregation=how))
        for event in arrivals:
            world.see(event)
        experience = world.experience("i1")
        got.add((experience.reward, experience.reward_confidence))
    [(made, confidence)] = got
    if how == "last":
        assert made == pytest.approx(reward, abs=0.3)
    silent = [n for n, what in enumerate(said) if what == "ok" or "?" in str(what)]
    without = World(make_join(aggregation=how))
    for n, event in enumerate(events):
        if n - 1 not in silent:
            without.see(event)
    if len(silent) < len(said):
        assert (made, confidence) == (
            without.experience("i1").reward,
            without.experience("i1").reward_confidence,
        )


def test_a_reply_without_an_id_is_about_the_latest_interaction_before_it() -> None:
    world = World().see(interaction("i1", at_s=0)).see(interaction("i2", at_s=10))
    world.see(interaction("i3", at_s=20))
    world.see(reply("r", at_s=20))  # the message that i3 responds to is no reply to i3
    assert set(world.replay) == {"i2"}
    world.see(reply("named", "i1", at_s=30))
    assert world.experience("i1").reply_ids == ["named"]


def test_a_reply_moves_when_its_own_interaction_arrives_late() -> None:
    world = World().see(interaction("i1", at_s=0)).see(reply("r", at_s=30))
    assert world.experience("i1").reply_ids == ["r"]
    world.see(interaction("i2", at_s=10))
    assert set(world.replay) == {"i2"}, "i1 is open again"
    assert world.experience("i2").reply_ids == ["r"]
    assert world.count("moved") == 1
    assert world.count("joined") == 1
    world.timer(WINDOW)
    assert world.experience("i1").outcome == "no_reply"


def test_an_interaction_whose_reply_moves_after_its_window_has_expired() -> None:
    world = World().see(interaction("i1", at_s=0)).see(reply("r", at_s=30)).timer(WINDOW)
    assert world.count("expired") == 0
    world.see(interaction("i2", at_s=10))
    assert (world.count("expired"), world.experience("i1").outcome) == (1, "no_reply")


def test_an_interaction_without_a_reply_closes_after_the_window() -> None:
    world = World().see(interaction("i1"))
    assert world.timer(WINDOW - 0.001).replay == {}
    assert world.conversation.due(WINDOW) == START + WINDOW
    got = world.timer(WINDOW).experience("i1")
    assert (got.revision, got.outcome, got.reward, got.reward_confidence) == (0, "no_reply", 0.0, 0.0)
    assert world.conversation.due(WINDOW) is None
    world.timer(2 * WINDOW)
    assert len(world.published) == world.count("expired") == 1


def test_a_clock_that_jumps_back_changes_nothing() -> None:
    world = World().see(interaction("i1")).timer(WINDOW)
    before = (world.replay.copy(), stored(world.conversation))
    world.timer(0).timer(-1e9)
    assert (world.replay, stored(world.conversation)) == before


def test_the_same_event_twice_changes_nothing_and_is_counted() -> None:
    events: list[InteractionEvent | ReplyEvent] = [interaction("i1"), reply("r1", "i1"), reply("r2", at_s=3)]
    world = World()
    for event in events:
        world.see(event)
    before = (world.replay.copy(), stored(world.conversation))
    for event in events:
        world.see(event)
    assert (world.replay, stored(world.conversation)) == before
    assert world.count("repeated") == 3
    assert len(world.published) == 2


@pytest.mark.parametrize("names", ["i1", None])
def test_a_late_reply_amends_an_experience_in_replay(names: str | None) -> None:
    world = World().see(interaction("i1")).timer(WINDOW)
    world.see(reply("late", names, at_s=WINDOW + 60, **THUMBS_DOWN))
    got = world.experience("i1")
    assert (got.revision, got.outcome, got.reward) == (1, "reply", -1.0)
    assert world.count("late") == 1


def test_a_reply_after_the_state_expired_amends_replay_exactly_once() -> None:
    world = World().see(interaction("i1")).see(reply("r1", "i1")).timer(LATE_S + WINDOW)
    assert world.conversation == Conversation()
    much_later = LATE_S + 3 * WINDOW
    for _ in range(2):
        world.see(reply("r2", "i1", at_s=much_later, **THUMBS_DOWN)).timer(much_later + WINDOW)
        got = world.experience("i1")
        assert (got.revision, got.reward, got.reply_ids) == (2, -1.0, ["r1", "r2"])
    assert world.count("orphaned") == 0


def test_a_late_reply_to_an_evicted_interaction_changes_nothing() -> None:
    world = World().see(interaction("i1")).timer(WINDOW)
    del world.replay["i1"]
    world.see(reply("late", "i1", at_s=WINDOW + 60))
    assert world.replay == {}


def test_a_reply_whose_interaction_never_arrives_is_an_orphan_after_the_window() -> None:
    world = World().see(reply("r1", "never", at_s=0)).see(reply("r2", at_s=0))
    assert world.timer(WINDOW - 1).count("orphaned") == 0
    assert world.timer(WINDOW).count("orphaned") == 2
    assert world.conversation == Conversation()


def test_events_sent_long_after_they_occurred_are_joined_in_any_order() -> None:
    events: list[InteractionEvent | ReplyEvent] = [
        interaction("i1"),
        reply("r1", "i1", at_s=5),
        reply("r2", at_s=6),
    ]
    for arrivals in itertools.permutations(events):
        world = World().timer(50 * LATE_S)
        for n, event in enumerate(arrivals):
            world.timer(50 * LATE_S + n).see(event)
        assert world.timer(50 * LATE_S + WINDOW - 1).experience("i1").reply_ids == ["r1", "r2"]


def test_state_is_bounded() -> None:
    world = World(make_join(max_kept=5))
    for i in range(20):
        world.see(interaction(f"i{i}", at_s=i))
        world.see(reply(f"r{i}", f"i{i}", at_s=i + 0.5))
        world.see(reply(f"w{i}", "unknown", at_s=i + 0.5))
    assert list(world.conversation.interactions) == [f"i{i}" for i in range(15, 20)]
    assert len(world.conversation.replies) == 10
    assert len(world.replay) == 20
    assert world.count("orphaned") == 15
    for i in range(20):
        world.see(reply(f"x{i}", "i19", at_s=40))
    assert world.experience("i19").revision == 5
    assert world.count("excess") == 16
    world.timer(10 * LATE_S)
    assert world.conversation == Conversation()


@pytest.mark.parametrize("how", ["first", "last", "mean", "min", "max", "sum"])
def test_which_of_too_many_replies_are_kept_does_not_depend_on_their_order(how: Aggregation) -> None:
    said = [
        reply(f"r{n}", "i1", at_s=n + 1, kind="rating", rating=(-1) ** n * (n % 7) / 7, text="")
        for n in range(30)
    ]
    made = set()
    for seed in range(5):
        world = World(make_join(aggregation=how, max_kept=8)).see(interaction("i1"))
        for event in random.Random(seed).sample(said, len(said)):
            world.see(event).see(event)
        made.add(world.replay["i1"])
        assert len(world.conversation.replies) == 8
    assert len(made) == 1
    assert world.experience("i1").reply_ids == [f"r{n}" for n in range(22, 30)]


@pytest.mark.parametrize("store_text", [False, True])
def test_text_is_stored_only_if_configured(store_text: bool) -> None:
    world = World(make_join(store_text=store_text)).see(interaction("i1", text="my secret"))
    world.see(reply("r1", "i1", text="Perfect, thanks, you saved me"))
    value = world.replay["i1"]
    state = b"".join(stored(world.conversation).values())
    for words in (b"my secret", b"Perfect"):
        assert (words in value) == store_text
        assert (words in state) == store_text
    assert b"you saved me" not in state or store_text


def test_a_switched_topic_or_a_repeated_request_is_detected_when_the_interaction_is_known() -> None:
    it = interaction("i1", message=np.array([1.0, 0, 0, 0]))
    near, other, again = np.array([1.0, 0.5, 0, 0]), np.array([0.0, 1.0, 0, 0]), np.array([2.0, 0.1, 0, 0])
    text = "book me a table for two tonight"
    for embedding, expected in (
        (near, "engagement"),
        (other, "disengagement"),
        (again, "correction"),
        (np.ones(3), "engagement"),
    ):
        pair: list[InteractionEvent | ReplyEvent] = [it, reply("r1", "i1", text=text, embedding=embedding)]
        for events in itertools.permutations(pair):
            world = World()
            for event in events:
                world.see(event)
            assert [s.type for s in world.experience("i1").signals] == [expected]


def test_pending_interactions_are_neither_closed_nor_removed() -> None:
    join, conversation, changes = make_join(max_kept=2), Conversation(), Changes()
    for n in range(3):
        event = decode_interaction(interaction(f"i{n}", at_s=n).to_bytes(), store_text=False)
        join.on_interaction(conversation, event, START, changes)
        [reply_] = join.read([decode_reply(reply(f"r{n}", f"i{n}", at_s=n + 0.5).to_bytes())])
        join.on_reply(conversation, reply_, START, changes)
    conversation.stamp(7)
    assert conversation.pending == {"i0": 7, "i1": 7, "i2": 7}
    join.on_timer(conversation, START + 10 * LATE_S, changes)
    assert [it.body is None for it in conversation.interactions.values()] == [False] * 3
    again = Conversation.load(stored(conversation))
    assert again.pending == conversation.pending
    again.pending.clear()
    join.on_timer(again, START + 10 * LATE_S, changes)
    assert again == Conversation()
    assert changes.closed == []


# --- any order

TIMES = st.integers(min_value=0, max_value=8).map(lambda n: n * WINDOW / 3)
IDS = st.sampled_from(["i0", "i1", "i2", "i3"])


@st.composite
def event_sets(draw: st.DrawFn) -> list[InteractionEvent | ReplyEvent]:
    events: list[InteractionEvent | ReplyEvent] = [
        interaction(f"i{n}", at_s=draw(TIMES)) for n in range(draw(st.integers(1, 4)))
    ]
    times = {e.interaction_id: (e.occurred_at - T0).total_seconds() for e in events}
    for n in range(draw(st.integers(1, 5))):
        rating = draw(st.sampled_from([-1.0, -0.5, 0.5, 1.0]))
        names = draw(st.none() | IDS)
        at_s = max(draw(TIMES), times.get(names or "", 0.0))  # a reply never precedes its interaction
        events.append(reply(f"r{n}", names, at_s=at_s, kind="rating", rating=rating, text=""))
    return events


def final(world: World) -> dict[str, bytes]:
    return world.timer(10 * LATE_S).replay


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_same_set_of_events_makes_the_same_experiences_in_every_order(data: st.DataObject) -> None:
    events = data.draw(event_sets())
    how = data.draw(st.sampled_from(["first", "last", "mean", "min", "max", "sum"]))
    in_order = World(make_join(aggregation=how))
    for event in sorted(events, key=lambda e: e.occurred_at):
        in_order.see(event)
    wanted = final(in_order)
    assert set(wanted) == {e.interaction_id for e in events if isinstance(e, InteractionEvent)}

    arrivals = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=4))))
    world = World(make_join(aggregation=how))
    for n, event in enumerate(arrivals):
        # Time may pass as long as every event still arrives within the window.
        first = {id(e): e for e in reversed(arrivals[:n])}
        to_come = [e.occurred_at.timestamp() - START for e in arrivals[n:] if id(e) not in first]
        if to_come and bool(data.draw(st.booleans())):
            world.timer(min(to_come) + WINDOW - 1)
        world.see(event)
    assert final(world) == wanted


@given(events=event_sets(), cut=st.integers(0, 8))
@settings(max_examples=50, deadline=None)
def test_a_stored_conversation_is_loaded_unchanged(
    events: list[InteractionEvent | ReplyEvent], cut: int
) -> None:
    join, conversation = make_join(), Conversation()
    fields: dict[bytes, bytes] = {}
    for n, event in enumerate(events):
        conversation, changes = conversation.copy(), Changes()
        if n == cut:
            join.on_timer(conversation, START + cut * WINDOW / 3, changes)
        elif isinstance(event, InteractionEvent):
            received = decode_interaction(event.to_bytes(), store_text=False)
            join.on_interaction(conversation, received, START, changes)
        else:
            [reply] = join.read([decode_reply(event.to_bytes())])
            join.on_reply(conversation, reply, START, changes)
        new, deleted = conversation.fields()
        fields = {k: v for k, v in fields.items() if k.decode() not in deleted}
        fields |= {name.encode(): value for name, value in new.items()}
        assert fields == stored(conversation)
        again = Conversation.load(fields)
        assert again == conversation
        assert again.size == conversation.size
        for reply in conversation.replies.values():
            assert again.target(reply) == conversation.target(reply)
        for it in conversation.interactions.values():
            mine = [r for r in conversation.replies.values() if conversation.target(r) is it]
            assert conversation.replies_of(it) == tuple(sorted(mine, key=lambda r: r.order))
            assert again.replies_of(it) == conversation.replies_of(it)
        assert again.waiting() == conversation.waiting()
        assert again.due(WINDOW) == conversation.due(WINDOW)
