"""The simulated users: repeatable, various, and as easy or hard to please as they say."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.text_encoder import HashingEncoder
from streams.demo import replies
from streams.demo.scenario import KINDS, MEMORIES, Kind
from streams.demo.users import CEILING, FLOOR, Users, memory_precision, reward

STRATEGIES = StrategyRegistry().ids
answers = st.tuples(st.sampled_from(STRATEGIES), st.sets(st.sampled_from(sorted(MEMORIES)), max_size=4))


def test_every_kind_wants_a_known_strategy_and_two_or_three_known_memories() -> None:
    assert 8 <= len(KINDS) <= 12
    assert {kind.strategy for kind in KINDS} == set(STRATEGIES)
    for kind in KINDS:
        assert set(kind.helpful) <= set(MEMORIES)
        assert 2 <= len(set(kind.helpful)) <= 3
    assert len(MEMORIES) - len({m for kind in KINDS for m in kind.helpful}) >= 8  # some help nobody


def test_words_alone_do_not_find_the_memories_that_help() -> None:
    encoder = HashingEncoder()
    users = Users(3)
    ids = list(MEMORIES)
    pool = encoder.encode_many([MEMORIES[i] for i in ids])
    precision = []
    for request in map(users.request, range(300)):
        order = np.argsort(-(pool @ encoder.encode(request.text)))
        precision.append(memory_precision(request.kind, [ids[i] for i in order[:3]]))
    assert np.mean(precision) < 0.5


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), indices=st.lists(st.integers(0, 5000), min_size=1, max_size=8), answer=answers
)
def test_the_same_seed_gives_the_same_users_whatever_the_order_and_the_answers(
    seed: int, indices: list[int], answer: tuple[str, set[str]]
) -> None:
    one, other = Users(seed), Users(seed)
    strategy, memories = answer
    for index in reversed(indices):  # `other` is asked in another order, and answers something else first
        other.react(other.request(index), "quick_answer", [])
    for index in indices:
        assert one.request(index) == other.request(index)
        assert one.react(one.request(index), strategy, memories) == other.react(
            other.request(index), strategy, memories
        )


def test_another_seed_gives_other_requests() -> None:
    texts = {seed: [Users(seed).request(i).text for i in range(200)] for seed in (0, 1)}
    assert len(set(texts[0]) & set(texts[1])) < 20


def test_thousands_of_distinct_sentences_arise() -> None:
    users = Users(0)
    requests = [users.request(i) for i in range(3000)]
    assert len({r.text for r in requests}) > 2700
    by_kind = defaultdict(set)
    for request in requests:
        by_kind[request.kind.name].add(request.text)
    assert min(len(texts) for texts in by_kind.values()) > 200
    assert not [r.text for r in requests if "{" in r.text or "  " in r.text]


@pytest.mark.parametrize("tone", ["praise", "complaint"])
def test_replies_of_either_polarity_come_in_many_phrasings(tone: replies.Tone) -> None:
    assert len(set(replies.BANKS[tone])) >= 60
    users = Users(5)
    said = set()
    for index in range(6000):
        request = users.request(index)
        good = tone == "praise"
        reaction = users.react(
            request, request.kind.strategy if good else "", request.kind.helpful if good else ()
        )
        said |= {reply.text for reply in reaction.replies if reply.tone == tone}
    assert len(said) > 1000
    assert not [text for text in said if "{" in text]


def test_conversations_are_one_users_and_carry_their_history() -> None:
    users = Users(2)
    conversations = defaultdict(list)
    for index in range(48 * 12):
        request = users.request(index)
        conversations[request.conversation].append(request)
    for requests in conversations.values():
        assert len({r.user for r in requests}) == 1
        for turn, request in enumerate(requests):
            assert request.history == tuple(r.text for r in requests[:turn])
            assert request.metadata["conversation_length"] == turn
    assert max(map(len, conversations.values())) > 1


@given(kind=st.sampled_from(KINDS), answer=answers)
def test_the_reward_is_a_probability_and_rises_with_strategy_and_memories(
    kind: Kind, answer: tuple[str, set[str]]
) -> None:
    strategy, memories = answer
    value = reward(kind, strategy, memories)
    assert FLOOR <= value <= CEILING
    assert reward(kind, kind.strategy, memories) >= value
    assert reward(kind, strategy, memories | {kind.helpful[0]}) >= value
    assert reward(kind, kind.strategy, kind.helpful) == pytest.approx(CEILING)
    assert reward(kind, "none", ()) == pytest.approx(FLOOR)


def test_content_users_mostly_praise_and_noise_silence_and_second_thoughts_occur() -> None:
    users = Users(7)
    first: Counter[tuple[bool, str]] = Counter()
    later: Counter[tuple[bool, str]] = Counter()
    silent, count = 0, 4000
    outcomes = []
    for index in range(count):
        request = users.request(index)
        right = index % 2 == 0
        reaction = users.react(
            request, request.kind.strategy if right else "", request.kind.helpful if right else ()
        )
        outcomes.append((reaction.reward, reaction.satisfied))
        silent += not reaction.replies
        if reaction.replies:
            first[reaction.satisfied, reaction.replies[0].tone] += 1
        for reply in reaction.replies[1:]:
            later[reaction.satisfied, reply.tone] += 1
        assert all(reply.delay_s > 0 and reply.text.strip() for reply in reaction.replies)
    assert 0.05 < silent / count < 0.3
    satisfied = sum(n for (is_satisfied, _), n in first.items() if is_satisfied)
    assert 0.75 < first[True, "praise"] / satisfied < 0.95
    discontent = sum(n for (is_satisfied, _), n in first.items() if not is_satisfied)
    assert 0.03 < first[False, "praise"] / discontent < 0.2  # they say the opposite, or thank too early
    assert min(first[False, t] for t in ("complaint", "correction", "confusion", "neutral")) > 50
    assert set(later) == {(True, "works_after_all"), (False, "broke_again")}
    assert np.mean([r for r, _ in outcomes]) == pytest.approx(np.mean([c for _, c in outcomes]), abs=0.03)


def test_two_policies_meet_the_same_luck() -> None:
    users = Users(11)
    better = 0
    for request in map(users.request, range(500)):
        good = users.react(request, request.kind.strategy, request.kind.helpful)
        bad = users.react(request, "", ())
        assert bool(good.replies) == bool(bad.replies)
        assert good.satisfied or not bad.satisfied  # who is satisfied with less is satisfied with more
        better += good.satisfied and not bad.satisfied
    assert better > 400
