"""Reading by meaning: what the head adds, when it keeps silent, and what it was measured on."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from benchmarks.feedback import collected, scored
from benchmarks.feedback_data import CLASSES, POLARITY, WRITERS, Part, Reply, load, normal, written_by
from benchmarks.train_feedback_head import TEMPERATURE, Lessons, Member, composed, export, rows_of, table_of
from cortex_core.arrays import FloatArray
from cortex_core.errors import WeightsError
from cortex_core.feedback.extractors import Semantic
from cortex_core.feedback.patterns import read
from cortex_core.feedback.semantic import FEATURES, HEAD, load_head, pattern_features
from cortex_core.feedback.tokens import MOST, UNKNOWN, Vocabulary, tokens
from cortex_core.feedback.tokens import words as words_of
from cortex_core.feedback_collector import FeedbackCollector, TextReading, Turn, turn_between
from cortex_core.text_encoder import HashingEncoder, TextEncoder, load_encoder

pytestmark = pytest.mark.xdist_group("semantic")  # loading the sentence encoder takes seconds


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return load_encoder("minilm")


Labelled = dict[Part, tuple[list[Reply], FloatArray]]


@pytest.fixture(scope="module")
def labelled(encoder: TextEncoder) -> Labelled:
    """The replies that nothing was trained on, with their embeddings."""
    parts: tuple[Part, ...] = ("test", "dialogue")
    return {p: (load(p), encoder.encode_many([r.text for r in load(p)])) for p in parts}


class TestTheLabelledReplies:
    def test_there_are_enough_of_every_class(self) -> None:
        test = load("test")
        assert len(test) >= 600
        for label in CLASSES:
            assert sum(r.label == label for r in test) >= 60
        assert sum(r.hard for r in test) >= 200

    @pytest.mark.parametrize("part", ["test", "dialogue"])
    def test_training_and_test_share_no_reply_nor_a_template(self, part: Part) -> None:
        train = load("train")
        learned = {normal(r.text) for r in [*train, *composed(train, 4000, seed=7)]}
        shared = [r.text for r in load(part) if normal(r.text) in learned]
        assert shared == []
        with_word: dict[str, set[frozenset[str]]] = {}
        for reply in train:
            if len(bag := frozenset(normal(reply.text).split())) >= 4:
                for word in bag:
                    with_word.setdefault(word, set()).add(bag)
        for reply in load(part):
            words = frozenset(normal(reply.text).split())
            if len(words) >= 5:
                # Whoever shares four fifths of the words has one of any fifth of them, and one more.
                rare = sorted(words, key=lambda word: len(with_word.get(word, ())))[: len(words) // 5 + 1]
                for bag in set().union(*(with_word.get(word, ()) for word in rare)):
                    assert len(words & bag) < 0.8 * len(words | bag), (reply.text, bag)

    def test_every_writer_wrote_every_class_and_none_repeats_another(self) -> None:
        normals = []
        for writer in range(1, WRITERS + 1):
            replies = written_by(writer)
            assert {r.label for r in replies} == set(CLASSES)
            normals.append({normal(r.text) for r in replies})
        assert len(set().union(*normals)) == sum(map(len, normals))


class TestTokens:
    def test_contractions_and_marks_are_opened_and_keep_their_place(self) -> None:
        text = "It didn’t WORK, sooooo bad?!"
        words, spans = tokens(text)
        assert words == ["it", "did", "not", "work", ",", "soo", "bad", "?!"]
        assert [text[a:b] for a, b in spans][1:4] == ["didn’t", "didn’t", "WORK"]

    @given(st.text(max_size=3000))
    def test_any_text_gives_few_tokens_with_spans_inside_it(self, text: str) -> None:
        words, spans = tokens(text)
        assert len(words) == len(spans) <= MOST
        assert all(words)
        assert words == words_of(text)
        assert all(0 <= a < b <= len(text) for a, b in spans)
        assert spans == sorted(spans)

    def test_an_unknown_word_is_looked_up_by_its_stem(self) -> None:
        vocabulary = Vocabulary(["crash", "tidy", "blame"])
        assert vocabulary.rows(["crash", "crashes", "crashing", "tidies", "blamed", "zzz"]) == [
            2, 2, 2, 3, 4, UNKNOWN,
        ]  # fmt: skip


class TestTheHead:
    def test_it_is_shipped_small_and_fits_this_code(self) -> None:
        assert HEAD.stat().st_size < 3_200_000
        head = load_head()
        assert head.dim == 384
        assert len(head.input_weight) == 384 + FEATURES + 1
        texts = ("", "?!", "it works " * 500)
        zeros = np.zeros((3, 384), np.float32), np.zeros((3, FEATURES), np.float32)
        for text, meaning in zip(texts, head.read(texts, *zeros), strict=True):
            assert sum(meaning.probabilities) == pytest.approx(1.0)
            assert all(evidence in text for evidence in meaning.evidence)

    def test_what_is_shipped_computes_what_was_trained(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        words = [*tokens("it did not work well,")[0], *map(chr, range(0x4E00, 0x4E50))]
        texts = ["It didn't work", "well, it did", " ".join(words)]
        x = torch.nn.functional.normalize(torch.randn(60, 384), dim=1)
        lesson = Lessons(texts, x, torch.zeros(60, 5), words, torch.randn(len(words), 384))
        table = table_of(lesson)
        members = [Member(384, t).eval() for t in (table, table, None)]
        file = tmp_path / "head.safetensors"
        export(members, lesson, file)
        f = torch.rand(len(texts), FEATURES)
        with torch.no_grad():
            rows = rows_of(texts, Vocabulary(words))
            logits = torch.stack([member(x[: len(texts)], f, rows) for member in members]).mean(0)
            wanted = torch.softmax(logits / TEMPERATURE, 1).numpy()
        read = load_head(file).read(texts, x[: len(texts)].numpy(), f.numpy())
        for got, probabilities in zip(read, wanted, strict=True):
            np.testing.assert_allclose(got.probabilities, probabilities, atol=2e-3)

    def test_no_order_of_summation_changes_what_it_computes(self) -> None:
        rng = np.random.default_rng(0)
        texts = [r.text for r in load("test")[::20]]
        x = rng.normal(size=(len(texts), 384)).astype(np.float32)
        f = np.array([pattern_features(*read(text)) for text in texts], dtype=np.float32)
        head = load_head()
        wanted = head.read(texts, x, f)
        d, k, units = rng.permutation(384), rng.permutation(192), rng.permutation(192)
        mixed = head.input_weight.copy()
        mixed[:384] = mixed[d]
        mixed[:, :192] = mixed[:, units]
        outputs = np.concatenate((head.output_weight[units], head.output_weight[192:]))
        word = rng.permutation(head.word_vectors.shape[1])
        windows = head.window_weight.reshape(3, len(word), 2, 192)[:, word][..., k].reshape(
            head.window_weight.shape
        )
        channels = head.channel_weight[:, k]
        channels[0] = channels[0][:, units]
        other = replace(
            head,
            input_weight=mixed,
            output_weight=outputs,
            window_weight=windows,
            window_bias=head.window_bias.reshape(2, 192)[:, k].ravel(),
            channel_weight=channels,
            word_vectors=head.word_vectors[:, word],
        )
        # The norm alone is added up in the order of the dimensions; so they are given unit vectors.
        axes = np.eye(384, dtype=np.float32)[: len(texts)]
        assert head.read(texts, axes, f) != wanted
        for vectors, permuted in ((axes, axes[:, d]), (np.sign(x), np.sign(x)[:, d])):
            assert other.read(texts, permuted, f) == head.read(texts, vectors, f)

    def test_a_damaged_or_foreign_head_is_refused(self, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(HEAD.read_bytes()[:1000])
        with pytest.raises(WeightsError, match="cannot be read"):
            load_head(damaged)
        foreign = tmp_path / "foreign.safetensors"
        arrays = load_file(HEAD)
        arrays["feature_weight"] = arrays["feature_weight"][:-1]
        save_file(arrays, foreign, metadata={"least_share": "0.4", "classes": ",".join(CLASSES)})
        with pytest.raises(WeightsError, match="train it again"):
            load_head(foreign)
        arrays = load_file(HEAD)
        arrays["window_weight"] = arrays["window_weight"] * np.float16(8)
        save_file(arrays, foreign, metadata={"least_share": "0.4", "classes": ",".join(CLASSES)})
        with pytest.raises(WeightsError, match="too large for exact sums"):
            load_head(foreign)

    def test_features_are_finite_and_bounded(self) -> None:
        for text in ("", "no " * 500, "perfect " * 500, "?!" * 500, "👍" * 100):
            features = pattern_features(*read(text))
            assert len(features) == FEATURES
            assert np.isfinite(features).all()
            assert max(features) <= 3.0

    def test_an_embedding_it_does_not_know_leaves_the_patterns_alone(self) -> None:
        semantic, patterns = FeedbackCollector("semantic-2"), FeedbackCollector("patterns-1")
        hashing = HashingEncoder(384)
        rng = np.random.default_rng(0)
        texts = ["Thanks, but that's wrong", "the squeak got louder", "no entiendo", "ok"]
        strange = [
            rng.normal(size=384).astype("f4"),
            np.ones(12, "f4"),
            hashing.encode("the squeak got louder"),
        ]
        for text in texts:
            for embedding in [None, *strange]:
                a = semantic.extract(text, embedding=embedding)
                b = patterns.extract(text)
                assert (a.reward, a.confidence, a.signals) == (b.reward, b.confidence, b.signals)

    def test_ratings_and_other_languages_are_left_to_the_patterns(self, encoder: TextEncoder) -> None:
        semantic, patterns = FeedbackCollector("semantic-2"), FeedbackCollector("patterns-1")
        for text in ("2/5", "10/10", "👎", "Das ist falsch", "谢谢，解决了", "не работает"):
            got = semantic.extract(text, embedding=encoder.encode(text))
            assert got.signals == patterns.extract(text).signals


class TestReadingMany:
    TEXTS = (*(r.text for r in load("test")[::10]), "", "2/5", "no entiendo", "ok " * 1500)

    @given(data=st.data())
    @settings(max_examples=10, deadline=None)
    def test_a_reply_is_read_alike_alone_and_in_every_batch(self, data: st.DataObject) -> None:
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        known = load_head().input_weight[:384, -128:].T
        texts = list(data.draw(st.permutations(self.TEXTS)))
        vectors = [(rng.normal(size=128) @ known + 0.02 * rng.normal(size=384)).astype("f2") for _ in texts]
        embeddings = [None if rng.random() < 0.1 else v for v in vectors]
        collector = FeedbackCollector("semantic-2")
        alone = [collector.read([t], [e])[0] for t, e in zip(texts, embeddings, strict=True)]
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, len(texts) - 1), max_size=6))), len(texts)]
        batches = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        assert [r for cut in batches for r in collector.read(texts[cut], embeddings[cut])] == alone
        unproven = FeedbackCollector("semantic-2", evidence=False).read(texts, embeddings)
        assert [without_evidence(r) for r in unproven] == [without_evidence(r) for r in alone]

    def test_what_a_turn_makes_of_a_reading_is_what_extract_says(self, encoder: TextEncoder) -> None:
        collector = FeedbackCollector("semantic-2")
        texts = [r.text for r in load("dialogue")[::4]]
        x = encoder.encode_many(texts)
        turns = Counter[Turn]()
        for text, vector, reading in zip(texts, x, collector.read(texts, list(x)), strict=True):
            for before in (vector, -vector, np.roll(x, 1, 0)[0]):
                turn = turn_between(before, vector)
                turns[turn] += 1
                extracted = collector.extract(text, embedding=vector, previous_embedding=before)
                assert reading.feedback(turn) == extracted
        assert len(turns) == 3


def without_evidence(reading: TextReading) -> TextReading:
    signals = tuple(replace(signal, evidence="") for signal in reading.signals)
    return replace(reading, signals=signals)


class TestReading:
    def test_it_reads_complaints_and_praise_without_a_keyword(self, encoder: TextEncoder) -> None:
        semantic, patterns = FeedbackCollector("semantic-2"), FeedbackCollector("patterns-1")
        for text, wanted in (
            ("You keep skipping the second question", -1),
            ("The file I asked about is not in there", -1),
            ("I went there and the place had burned down, useless trip", -1),
        ):
            feedback = semantic.extract(text, embedding=encoder.encode(text))
            assert np.sign(feedback.reward) == wanted, text
            assert feedback.explicit, text
        assert not patterns.extract("You keep skipping the second question").explicit

    def test_what_it_cannot_judge_it_does_not_praise(self, encoder: TextEncoder) -> None:
        semantic = FeedbackCollector("semantic-2")
        for text in ("The meal arrived stone cold", "They hung up on me", "Half of the rows have vanished"):
            assert semantic.extract(text, embedding=encoder.encode(text)).reward <= 0.1, text

    def test_a_bare_next_request_stays_engagement(self, encoder: TextEncoder) -> None:
        semantic = FeedbackCollector("semantic-2")
        for text in (
            "Which trains leave for York before ten?",
            "Set an alarm for seven",
            "a table for two, please",
        ):
            feedback = semantic.extract(text, embedding=encoder.encode(text))
            assert [s.type.value for s in feedback.signals] == ["engagement"], text
            assert feedback.confidence <= 0.1

    @pytest.mark.parametrize(("part", "least", "opposite"), [("test", 0.72, 0.07), ("dialogue", 0.88, 0.03)])
    def test_it_does_not_fall_behind_what_was_measured(
        self, labelled: Labelled, part: Part, least: float, opposite: float
    ) -> None:
        replies, embeddings = labelled[part]
        figures = scored(replies, collected("semantic-2", replies, embeddings))
        plain = scored(replies, collected("patterns-1", replies, None))
        assert figures["macro_f1"] >= least
        assert figures["macro_f1"] > plain["macro_f1"]
        assert figures["opposite"] <= opposite

    def test_confidence_means_what_it_says(self, labelled: Labelled) -> None:
        """Of the signs it takes, about as many are right as it says."""
        semantic = FeedbackCollector("semantic-2")
        said = []
        for reply, embedding in (pair for part in labelled.values() for pair in zip(*part, strict=True)):
            feedback = semantic.extract(reply.text, embedding=embedding)
            if feedback.explicit:
                said.append((feedback.confidence, np.sign(feedback.reward) == POLARITY[reply.label]))
        confidence, right = np.array(said, dtype=np.float64).T
        assert abs(confidence.mean() - right.mean()) < 0.08
        sure = confidence > 0.9
        assert right[sure].mean() > right[~sure].mean() + 0.05

    def test_thresholds_leave_doubtful_replies_unread(self) -> None:
        assert Semantic.THRESHOLD >= 0.5
        assert (
            Semantic.MAX_OPPOSITE
            < Semantic.THRESHOLD
            < Semantic.NEGATIVE_WITHOUT_PHRASE
            < Semantic.POSITIVE_WITHOUT_PHRASE
        )

    def test_it_names_the_words_that_carried_a_signal(self, encoder: TextEncoder) -> None:
        semantic = FeedbackCollector("semantic-2")
        text = "I went there and the place had burned down, useless trip"
        (signal,) = semantic.extract(text, embedding=encoder.encode(text)).signals
        assert signal.evidence
        assert signal.evidence in text
