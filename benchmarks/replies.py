"""Replies of the benchmark's users: two banks without common sentences.

Written like chat messages, independently of the extractors' word lists: many have no word that says "good" or
"bad", some have the wrong one. `plain` is the default; `terse` is shorter, ruder and harder to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplyBank:
    """Replies of satisfied users, of dissatisfied users, and replies that do not concern the answer."""

    satisfied: tuple[str, ...]
    dissatisfied: tuple[str, ...]
    neutral: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All replies."""
        return (*self.satisfied, *self.dissatisfied, *self.neutral)


# fmt: off
_PLAIN = ReplyBank(
    satisfied=(
        "Thanks!", "Thank you so much", "thanks, that worked", "Perfect", "Perfect, thank you",
        "That's right", "Great, that's what I needed", "awesome", "Yes, exactly", "that helps a lot, thanks",
        "Great answer", "Works now, cheers", "That did the trick", "Brilliant", "Good, thanks",
        "lovely, thank you", "👍", "You're a lifesaver", "Excellent, exactly what I was looking for",
        "nice one", "Very helpful, thanks", "ok great, got it working", "Thx, solved", "That is correct",
        "wonderful", "love it", "Amazing, thank you!", "perfect, and can you remind me tomorrow too?",
        "Thanks. Next, how do I set up the other one?", "It went through on the first try", "sorted!",
        "Now it makes sense", "oh that was easy", "No problem on my end any more", "Not bad at all",
        "couldn't be better", "I was worried for nothing", "Just did it and it's all there",
        "my card is unblocked, phew", "That saved me a trip to the branch", "You read my mind",
        "I'll do exactly that", "yep that was it", "Finally!", "That's the one",
        "Done, and my wife is happy too", "can't argue with that", "All green now", "it's back up",
        "You explained that better than the manual", "I'll recommend you to my colleagues",
        "I had given up on that, and now it runs", "no further questions", "that clears things up",
        "okay that was quicker than I thought", "exactly the level of detail I wanted", "Bookmarked this",
        "haha yes!! you got it", "so glad I asked", "I never knew it could be that simple",
        "Couldn't have said it better", "the total matches now", "They accepted it right away",
        "Booked it, see you there", "that's me set for the day", "10/10 would ask again",
        "Followed your steps and the error is gone", "It stopped complaining", "mum says thank you as well",
        "Right on the money", "the short version was just right", "I can breathe again", "Boom, done",
        "that fixed the thing I'd been fighting with all morning", "aha, so that's how",
        "Yes please, always like this", "why did nobody tell me this before, thanks", "I'm impressed",
        "good catch", "well spotted", "Smart idea, I'd not have thought of it", "worth the wait",
        "my fault, your first answer was fine",
    ),
    dissatisfied=(
        "That's wrong", "No, that's not right", "Not right", "that didn't work", "This is useless",
        "wrong answer", "No, I meant the other one", "Actually, I asked about something else", "What?",
        "I don't understand", "Can you clarify?", "That makes no sense", "👎", "Not helpful",
        "not what I asked", "Terrible", "still not working", "Incorrect", "bad answer", "No no no",
        "That is not true", "I'm confused", "it doesn't work", "This doesn't help",
        "I said I don't want that", "Hmm, that's not it", "could you explain that again? I'm lost",
        "Sorry, what do you mean?", "actually I wanted the short version", "it crashed",
        "that link goes nowhere", "I get an error when I do that", "page not found",
        "The number you gave me is out of service", "they told me the opposite on the phone",
        "nothing happened", "I've done all of that already", "and how does that answer my question?",
        "you lost me at the second line", "Never mind, I'll call them", "I'd rather talk to a person",
        "can I speak with someone human", "Did you even read what I wrote?",
        "that's three paragraphs and no answer", "I need the steps, not an essay", "Too long, didn't read",
        "I asked a yes or no question", "you're going in circles",
        "the screen looks nothing like what you describe", "that menu doesn't exist",
        "we don't have that here", "This is for another country", "it's last year's rate",
        "charged me twice now", "now it's even slower", "great, now it's broken completely",
        "thanks for nothing", "Nice try but wrong", "oh wonderful, another error",
        "not perfect, not even close", "I wish that had worked", "if only it were so simple",
        "same as before", "back to square one", "I'm going to cancel my account",
        "my boss will not like this", "that cost me an hour", "I'm none the wiser", "seriously?", "Whatever",
        "Forget it", "please stop asking me questions and just do it", "just tell me the answer",
        "I wanted you to ask first", "you assumed the wrong city", "the date is off by a week",
        "wait, why would I do that?", "doesn't match what's on my statement", "half of these are closed",
        "that would take days", "it asks me for a code I never got", "they refused it",
        "I don't think you understood the question", "huh, no", "more of the same",
        "are you sure? it says otherwise on the site", "this is getting old",
    ),
    neutral=(
        "ok", "Okay", "I see", "hm", "right", "noted", "I'll have a look", "let me check", "brb",
        "one moment", "What time is it in Tokyo?", "and what's the weather tomorrow?", "Next question",
        "By the way, who are you?", "Also, set an alarm for six", "I need to ask you about my car too",
        "let me think about it", "Will try it tonight", "I'll get back to you", "another thing",
        "what about next month?", "hello again", "can you also check my calendar?", "I'm on the train now",
        "give me a minute", "we'll see", "interesting", "how old are you?", "play some music",
        "what's on my list?", "I'll ask my husband", "then the other account",
    ),
)

_TERSE = ReplyBank(
    satisfied=(
        "ty", "thx", "yes!", "yep", "nice", "cool cool", "sweet", "🙏", "🎉", "gr8", "works", "fixed",
        "solved it", "that's it", "spot on", "bingo", "cheers mate", "legend", "ace", "good stuff", "gold",
        "ez", "done deal", "runs fine", "up again", "passed", "it's in", "got the refund", "arrived today",
        "ship it", "LGTM", "all sorted", "as it should be", "saved me", "five stars", "clear now",
        "makes sense", "you rock", "A+", "smooth", "nailed it", "no more errors", "can't complain",
        "wasn't hard at all", "fair enough, agreed",
    ),
    dissatisfied=(
        "nope", "nah", "no", "wrong one", "???", "eh?", "huh", "meh", "useless", "fail", "broken",
        "still broken", "same error", "404", "timed out", "dead link", "2/5", "D-", "🙄", "😡", "lol no",
        "not that", "other way round", "too vague", "way too long", "get to the point", "rubbish", "garbage",
        "try again", "read again", "again, no", "stop it", "off topic", "says denied", "declined again",
        "outdated", "closed since May", "who asked for that", "says who?", "makes it worse", "yeah right",
        "sure, genius", "I give up", "agent please", "refund me", "ugh",
    ),
    neutral=(
        "k", "mm", "mhm", "later", "busy", "afk", "next", "other thing", "hi", "u there?", "sec", "so",
        "and then?", "what else", "anyway", "new topic", "bus is here", "call me Sam", "in Spanish?",
        "for two people",
    ),
)
# fmt: on

BANKS: Mapping[str, ReplyBank] = {"plain": _PLAIN, "terse": _TERSE}
"""Values of `--replies`."""
