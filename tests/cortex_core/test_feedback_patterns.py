"""Reading by patterns: scope, hedges, irony, ratings, quotation, languages."""

from __future__ import annotations

import pytest

from cortex_core.feedback.patterns import read
from cortex_core.feedback_collector import FeedbackCollector

PRAISED = """
Actually, that's great | that's not wrong | not bad at all | it isn't bad | couldn't be better
no complaints | No, that's all, thank you | Perfect, can you also add tests?
Thanks! How do I deploy it? | it was wrong at first, but now it works
Not perfect but it works for me, thanks | the error is gone | no more errors
thanks, that fixed the error | sooo good | thaaanks | looks nice though
Not only is it fast, it's also accurate | I can't thank you enough | A+ | 10/10 | 4.5/5 | five stars
⭐⭐⭐⭐⭐ | ❤️ | :) | lgtm | thx | ty | you were right | I stand corrected | it no longer crashes
He's wrong, but you are right
"""

BLAMED = """
not perfect | nice try but wrong | it crashed | that link goes nowhere | thanks for nothing
great, it broke again | oh great, another error | Thanks, but that's wrong
still fails: Traceback (most recent call last) | 2/5 | 1 star | D- | ⭐⭐ | So helpful. Not.
it was working fine until you touched it | looks good but it doesn't run | it doesn't make sense
Although it looks nice, it is wrong | no that's so wrong | that's not helpful at all
I don't think that's right | never worked | why is it still broken? | nothing works
none of these links work | the page is blank | 😡 | :( | 🙄 | I gave up
"""

MISSED = """
No, I meant the blue one | Actually, for three people | not the red one, the blue one
that's not what I asked | what do you mean? | huh? | I don't understand
thanks, but I don't understand the second step | I'm lost | Nice, but in blue
the left one, not the right one
"""

UNSAID = """
Is that right? | How do I fix a crash in my app? | find me a great restaurant
I want a good hotel, thanks | no problem | no worries | no thanks | what is wrong with my code?
if it works I'll tell you | let me know if it works | I hope it works
He said "that's wrong" and left | The button says "Perfect!" | Can you book it? Thanks
my boss is horrible | I love Thai food | Write a thank you note | `raise ValueError("wrong")`
> That's wrong | the score is 3/5 so far | it's 24/7 | 1/2 cup of sugar | would that be correct?
it would be great if it had parking | raise an error when the list is empty | don't worry | not yet
see https://example.org/wrong/path | add error handling | does it work offline? | ok | sure
Yes, please book it
"""

LANGUAGES = {
    "de": ("Danke, das hat geklappt", "Das ist falsch", "Nein, ich meinte morgen", "Was meinst du damit?"),
    "fr": ("Merci, c'est parfait", "ça ne marche pas", "non, je voulais dire demain", "je ne comprends pas"),
    "es": ("Muchas gracias, perfecto", "no funciona", "me refiero a otro", "no entiendo"),
    "pt": ("Obrigado, deu certo", "não funciona", "eu quis dizer amanhã", "não entendi"),
    "it": ("Grazie mille, ottimo", "non funziona", "intendevo domani", "non capisco"),
    "nl": ("Bedankt, het werkt nu", "werkt niet", "ik bedoelde morgen", "ik snap het niet"),
    "pl": ("Dziękuję, działa", "nie działa", "chodziło mi o jutro", "nie rozumiem"),
    "tr": ("Teşekkürler, çok iyi", "çalışmıyor", "demek istediğim yarın", "anlamadım"),
    "ru": ("Спасибо, всё работает", "не работает", "я имел в виду завтра", "не понимаю"),
    "zh": ("谢谢，解决了", "还是不行", "我的意思是明天", "什么意思"),
    "ja": ("ありがとう、できました", "動かない", "明日という意味です", "どういうことですか"),
}


def split(text: str) -> list[str]:
    return [part.strip() for line in text.strip().splitlines() for part in line.split(" | ") if part.strip()]


def sign(text: str) -> int:
    feedback = FeedbackCollector("patterns-1").extract(text)
    return (feedback.reward > 0) - (feedback.reward < 0) if feedback.explicit else 0


@pytest.mark.parametrize("text", split(PRAISED))
def test_praise(text: str) -> None:
    assert sign(text) == 1


@pytest.mark.parametrize("text", split(BLAMED))
def test_blame(text: str) -> None:
    assert sign(text) == -1


@pytest.mark.parametrize("text", split(MISSED))
def test_correction_and_confusion(text: str) -> None:
    assert sign(text) == -1


@pytest.mark.parametrize("text", split(UNSAID))
def test_nothing_said_of_the_answer(text: str) -> None:
    assert sign(text) == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_languages(language: str) -> None:
    found = [
        {s.type.value for s in FeedbackCollector("patterns-1").extract(text).signals}
        for text in LANGUAGES[language]
    ]
    for types, wanted in zip(found, ("positive", "negative", "correction", "confusion"), strict=True):
        assert wanted in types, (language, wanted, types)


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("Well, That’s Right!", ["That’s Right"]),
        ("It isn't bad", ["bad"]),
        ("thanks 👍", ["thanks", "👍"]),
        ("STILL BROKEN", ["STILL BROKEN"]),
        ("谢谢", ["谢谢"]),
    ],
)
def test_evidence_is_cut_from_the_reply_as_it_was_written(text: str, evidence: list[str]) -> None:
    assert [hit.evidence for hit in read(text)[0]] == evidence


def test_long_pastes_are_read_at_both_ends_and_cost_little() -> None:
    paste = "x = 1\n" * 20_000
    assert sign(f"still broken:\n{paste}") == -1
    assert sign(f"{paste}\nthanks, that worked") == 1
