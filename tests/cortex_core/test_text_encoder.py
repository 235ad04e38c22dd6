"""The sentence encoder on texts that are longer than it reads at once."""

from __future__ import annotations

import numpy as np
import pytest

from cortex_core.text_encoder import MAX_WINDOWS, SentenceTransformerEncoder

RULES = "This note repeats the general rules for reviews and on-call duties of the operations team. "
LINE = "INFO 2026-03-03 12:00:01 request served in 12 ms by worker 4\n"


@pytest.fixture(scope="module")
def encoder() -> SentenceTransformerEncoder:
    return SentenceTransformerEncoder()


@pytest.mark.parametrize("repeats", [20, 60, 200])
def test_what_a_long_text_ends_with_counts(encoder: SentenceTransformerEncoder, repeats: int) -> None:
    question = encoder.encode("What is the staging cluster called?")
    names = encoder.encode(RULES * repeats + "The staging cluster is called blue.")
    other = encoder.encode(RULES * repeats + "The office dog is called Rex.")
    assert question @ names > question @ other
    log = LINE * repeats
    asked, else_asked = encoder.encode_many(
        [log + "How do I rotate the certificate?", log + "Who is on call?"]
    )
    assert asked @ else_asked < 0.9999


def test_every_text_has_the_same_embedding_alone_and_among_others(
    encoder: SentenceTransformerEncoder,
) -> None:
    texts = ["short", RULES * 9, "", RULES * 40, "also short", "词" * 300]
    together = encoder.encode_many(texts)
    np.testing.assert_allclose(together, [encoder.encode(text) for text in texts], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)


def test_texts_of_which_the_middle_is_not_read_are_counted(encoder: SentenceTransformerEncoder) -> None:
    before = encoder.shortened
    encoder.encode(RULES * 20)
    assert encoder.shortened == before
    middle = "The staging cluster is called blue. "
    ends = RULES * 100
    a, b = encoder.encode_many([ends + middle + ends, ends + RULES + ends])
    assert encoder.shortened == before + 2
    assert len(encoder._windows(ends + ends)) == MAX_WINDOWS
    assert a @ b > 0.999
