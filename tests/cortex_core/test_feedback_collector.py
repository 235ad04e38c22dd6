"""From replies to rewards: the specified table, combination, ratings, topics, versions."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError
from cortex_core.feedback_collector import (
    EXTRACTORS,
    SIGNAL_REWARDS,
    Aggregation,
    Feedback,
    FeedbackCollector,
    SignalType,
    aggregate_rewards,
)


@pytest.fixture(params=sorted(EXTRACTORS))
def collector(request: pytest.FixtureRequest) -> FeedbackCollector:
    return FeedbackCollector(request.param)


def types(feedback: Feedback) -> set[str]:
    return {signal.type.value for signal in feedback.signals}


_WORDS = ["👍", "thanks", "it", "is", "i", "meant", "what", "error", "👎"]
TABLE = [
    ("positive", ["Thanks!", "Perfect", "That's right", "👍"], 0.5, 1.0),
    ("negative", ["That's wrong", "Not right", "👎"], -1.0, -0.5),
    ("correction", ["No, I meant the other one", "Actually, on Friday"], -0.5, -0.2),
    ("confusion", ["What?", "I don't understand", "Can you clarify?"], -0.3, -0.1),
]


@pytest.mark.parametrize(("kind", "examples", "low", "high"), TABLE)
def test_the_specified_table(
    collector: FeedbackCollector, kind: str, examples: list[str], low: float, high: float
) -> None:
    for text in examples:
        feedback = collector.extract(text)
        explicit = [s for s in feedback.signals if s.type != SignalType.ENGAGEMENT]
        assert [s.type.value for s in explicit] == [kind], text
        assert low <= explicit[0].reward <= high, text
        assert math.copysign(1, feedback.reward) == math.copysign(1, low + high), text
        assert feedback.explicit
        assert feedback.confidence >= 0.4, text
        assert explicit[0].evidence.lower().strip("?!.") in text.lower() or explicit[0].evidence in text
        assert feedback.extractor == collector.extractor


def test_engagement_and_disengagement(collector: FeedbackCollector) -> None:
    on = collector.extract("How do I sort a list in Python?")
    assert types(on) == {"engagement"}
    assert on.reward == pytest.approx(0.1)
    off = collector.extract("How do I sort a list in Python?", topic_switched=True)
    assert types(off) == {"disengagement"}
    assert off.reward == pytest.approx(-0.1)
    assert not on.explicit
    assert not off.explicit
    last = collector.extract("How do I sort a list?", conversation_continued=False)
    assert last.signals == ()
    assert last.reward == 0.0


def test_nobody_replied_is_told_from_a_reward_of_nought(collector: FeedbackCollector) -> None:
    silence = collector.extract("", conversation_continued=False)
    assert (silence.signals, silence.reward, silence.confidence) == ((), 0.0, 0.0)
    rated = collector.from_rating(0)
    assert (rated.reward, rated.confidence) == (0.0, 1.0)


def test_strength_grows_with_the_number_of_matches_to_the_end_of_the_range() -> None:
    collector = FeedbackCollector("patterns-1")
    rewards = [
        next(s.reward for s in collector.extract(text).signals if s.type == SignalType.POSITIVE)
        for text in (
            "Perfect.",
            "Perfect, thanks!",
            "Perfect, thanks! That worked.",
            "Perfect, thanks! That worked. 👍",
        )
    ]
    assert rewards == [0.5, 0.75, 1.0, 1.0]


def test_several_signals_combine_and_are_clamped() -> None:
    collector = FeedbackCollector("patterns-1")
    both = collector.extract("No, that's wrong. I meant the blue one.")
    assert {"negative", "correction"} <= types(both)
    assert both.reward == pytest.approx(sum(s.reward for s in both.signals))
    extreme = collector.extract("Wrong, terrible, useless. I meant the other. I don't understand.")
    assert extreme.reward == -1.0
    assert sum(s.reward for s in extreme.signals) < -1.0
    praise = collector.extract("Perfect, excellent, brilliant, thanks!")
    assert praise.reward == 1.0


def test_a_complaint_that_goes_on_is_no_praise() -> None:
    feedback = FeedbackCollector("patterns-1").extract("What?")
    assert types(feedback) == {"confusion"}
    assert feedback.reward == pytest.approx(-0.1)


def test_confidence_is_high_for_plain_words_and_low_for_none() -> None:
    collector = FeedbackCollector("patterns-1")
    assert collector.extract("Perfect, thank you, that worked").confidence > 0.95
    assert collector.extract("Book a table for two").confidence <= 0.1
    mixed = collector.extract("The first part is perfect. The second part is wrong.")
    assert 0 <= mixed.confidence < 0.3


class TestTheSameAgain:
    def test_asking_the_same_again_is_a_correction(self, collector: FeedbackCollector) -> None:
        again = collector.extract("How do I reset my password", previous_text="how do I reset my password?")
        assert types(again) == {"correction"}
        assert again.reward < 0

    def test_another_question_is_not(self, collector: FeedbackCollector) -> None:
        other = collector.extract("How do I close my account?", previous_text="how do I reset my password?")
        assert types(other) == {"engagement"}

    def test_saying_thanks_twice_is_not(self, collector: FeedbackCollector) -> None:
        assert types(collector.extract("Thank you so much", previous_text="thank you so much")) == {
            "positive",
            "engagement",
        }


class TestEmbeddings:
    def test_unlike_messages_switch_the_topic(self) -> None:
        collector = FeedbackCollector("patterns-1")
        text = "how many feet are in a mile"
        a, b = np.eye(8, dtype=np.float32)[:2]
        assert types(collector.extract(text, embedding=a, previous_embedding=b)) == {"disengagement"}
        assert types(collector.extract(text, embedding=a, previous_embedding=a + 0.5 * b)) == {"engagement"}
        assert "disengagement" not in types(collector.extract("Thanks!", embedding=a, previous_embedding=b))
        told = collector.extract(text, embedding=a, previous_embedding=b, topic_switched=False)
        assert types(told) == {"engagement"}

    def test_the_same_meaning_asks_again(self) -> None:
        collector = FeedbackCollector("patterns-1")
        a, b = np.eye(8, dtype=np.float32)[:2]
        again = collector.extract("how many feet are in a mile", embedding=a, previous_embedding=a + 0.1 * b)
        assert types(again) == {"correction"}
        assert types(collector.extract("ok", embedding=a, previous_embedding=a)) == {"engagement"}

    def test_unusable_ones_are_refused(self, collector: FeedbackCollector) -> None:
        with pytest.raises(NonFiniteError):
            collector.extract("ok", embedding=np.full(384, np.nan, np.float32))
        with pytest.raises(DimensionError, match="previous_embedding"):
            collector.extract(
                "ok", embedding=np.ones(4, np.float32), previous_embedding=np.ones(5, np.float32)
            )
        with pytest.raises(InputError, match="NoneType, expected a string"):
            collector.extract(None)  # type: ignore[arg-type]  # the wrong type is the test


class TestRatings:
    @pytest.mark.parametrize("value", [-1, -0.3, 0.0, 0.5, 1, np.float32(0.25)])
    def test_a_rating_is_taken_at_its_word(self, value: float) -> None:
        feedback = FeedbackCollector().from_rating(value)
        assert feedback.reward == pytest.approx(float(value))
        assert feedback.confidence == 1.0
        assert feedback.extractor == "rating-1"

    @pytest.mark.parametrize("value", [1.01, -2, float("nan"), float("inf"), "5", None, True])
    def test_anything_else_is_refused(self, value: object) -> None:
        with pytest.raises(InputError, match="rating"):
            FeedbackCollector().from_rating(value)  # type: ignore[arg-type]  # the wrong type is the test


class TestAggregation:
    REWARDS = (0.6, -0.5, 0.2)

    @pytest.mark.parametrize(
        ("how", "wanted"),
        [("first", 0.6), ("last", 0.2), ("mean", 0.1), ("min", -0.5), ("max", 0.6), ("sum", 0.3)],
    )
    def test_each_way(self, how: Aggregation, wanted: float) -> None:
        assert aggregate_rewards(self.REWARDS, how) == pytest.approx(wanted)

    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=6))
    def test_it_stays_a_reward(self, rewards: list[float]) -> None:
        for how in ("first", "last", "mean", "min", "max", "sum"):
            assert -1.0 <= aggregate_rewards(rewards, how) <= 1.0

    def test_what_cannot_be_aggregated(self) -> None:
        with pytest.raises(InputError, match="no rewards"):
            aggregate_rewards([])
        with pytest.raises(InputError, match=r"reward is 1\.5"):
            aggregate_rewards([1.5])
        with pytest.raises(NonFiniteError):
            aggregate_rewards([float("nan")])
        with pytest.raises(ConfigError, match="median"):
            aggregate_rewards([0.1], "median")  # type: ignore[arg-type]  # the wrong type is the test


def test_an_unknown_extractor_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"patterns-0.*expected one of patterns-1, semantic-2"):
        FeedbackCollector("patterns-0")


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_reward_and_a_confidence_in_range(text: str) -> None:
    feedback = FeedbackCollector("patterns-1").extract(text)
    assert -1.0 <= feedback.reward <= 1.0
    assert 0.0 <= feedback.confidence <= 1.0
    for signal in feedback.signals:
        low, high = sorted(SIGNAL_REWARDS[signal.type])
        assert low <= signal.reward <= high
        assert 0.0 <= signal.strength <= 1.0
        assert signal.evidence


@given(
    st.lists(
        st.sampled_from(["not", "no", "but", ",", ".", "!", "?", "perfect", "wrong", "👍", *_WORDS]),
        max_size=14,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_order_of_the_words_it_knows_is_read(words: list[str]) -> None:
    feedback = FeedbackCollector("patterns-1").extract(" ".join(words))
    assert feedback.reward == pytest.approx(
        min(max(sum(s.reward for s in feedback.signals), -1.0), 1.0), abs=1e-6
    )


def test_importing_and_reading_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from cortex_core.feedback_collector import FeedbackCollector\n"
        "import numpy as np\n"
        "FeedbackCollector('semantic-2').extract('Thanks!', embedding=np.ones(384))\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
