"""Reply texts of the simulated users: templates with slots, by tone.

Written like chat messages, independently of the extractors' word lists: some praise is faint, some complaints
are polite, and some replies do not concern the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Tone = Literal["praise", "complaint", "correction", "confusion", "neutral", "broke_again", "works_after_all"]

# fmt: off
SLOTS: Mapping[str, tuple[str, ...]] = {
    "thanks": (
        "Thanks", "Thank you", "Thx", "Many thanks", "Cheers", "Thanks a lot", "ty", "Thank you so much",
    ),
    "very": ("really", "very", "so", "truly", "actually", "pretty", "super"),
    "good": (
        "good", "great", "excellent", "helpful", "brilliant", "perfect", "lovely", "spot on", "useful",
        "neat",
    ),
    "bad": (
        "wrong", "useless", "off", "bad", "unhelpful", "not right", "no good", "poor", "nonsense",
        "way off",
    ),
    "solved": (
        "solved it", "fixed it", "did the trick", "did it", "worked", "sorted it out", "got me there",
    ),
    "person": ("my boss", "the team", "my colleague", "the client", "everybody here", "my lead"),
    "minutes": ("two minutes", "half an hour", "an afternoon", "a lot of time", "ten minutes"),
    "sigh": ("Sigh", "Argh", "Ugh", "Oh no", "Hm", "Honestly", "Seriously", "Come on"),
    "still": ("still", "again", "even now"),
    "huh": ("Huh", "What", "Sorry", "Pardon", "Eh", "Hmm", "Wait"),
}

BANKS: Mapping[Tone, tuple[str, ...]] = {
    "praise": (
        "{thanks}!", "{thanks}, that {solved}", "{thanks}, that was {very} {good}",
        "That {solved}, {thanks}", "Perfect", "Perfect, {thanks}", "{good}!", "Exactly what I needed",
        "Exactly, {thanks}", "That's right", "Yes, that's it", "Yes! That {solved}", "You nailed it",
        "Works like a charm", "Works now, {thanks}", "Awesome, that {solved}", "Love it",
        "I love this answer", "That's {very} {good}", "That is {good}", "Brilliant, just what I was after",
        "You saved me {minutes}", "Great help, {thanks}", "Nice one", "Wow, that was quick and {good}",
        "Now I get it, {thanks}", "Makes sense now, {thanks}", "That clears it up",
        "Got it working, {thanks}", "It works!", "All good now", "Problem solved",
        "{person} will be happy, {thanks}", "{person} liked it too", "Best answer I got all week",
        "Couldn't have asked for more", "No complaints, that {solved}", "Not bad at all!",
        "Sweet, that {solved}", "This is {very} {good}, keep it up", "Right on the money",
        "That hit the spot", "Super, {thanks}", "I appreciate it, that {solved}",
        "Finally someone who understands, {thanks}", "Great, that helps", "That helps a lot",
        "Very clear, {thanks}", "Well explained", "Good answer", "Great stuff",
        "Followed it and everything went fine", "Tried it, it {solved}", "Just tried it: it works",
        "Can't believe it was that easy, {thanks}", "I was lost before, now it's clear", "10/10",
        "Happy with that, {thanks}", "You're a star", "Cool, {thanks}", "Fantastic, {thanks}",
        "That'll do nicely", "Spot on about {topic}", "Good call on {topic}", "{topic}: done, {thanks}",
        "Yep, that was it",
    ),
    "complaint": (
        "That's {bad}", "This is {bad}", "That's {very} {bad}", "No, that's {bad}", "Nope",
        "{sigh}. That's {bad}", "It {still} doesn't work", "Doesn't work", "That didn't work",
        "That did not help", "Didn't help at all", "Not helpful", "Not what I asked",
        "You didn't answer my question", "This doesn't answer anything", "That's not right",
        "That is not what I need", "Not right", "{sigh}, {still} broken", "I tried that, no change",
        "Tried it and now it's worse", "That made it worse", "Same error", "{still} the same error",
        "Waste of time", "You wasted {minutes} of mine", "I don't need a lecture", "Way too long",
        "Too vague to be of use", "That's out of date", "None of this applies to us",
        "{sigh}, read my question", "Terrible answer", "Awful", "This is getting frustrating",
        "I'm disappointed", "I expected more", "{person} laughed at that answer",
        "{person} says that's {bad}", "I'd rather talk to a human", "Can I speak to a person please",
        "Forget it", "Never mind, I'll do it myself", "Never mind", "No use", "Bad advice",
        "That can't be true", "That's simply false", "I doubt that", "This won't fly here",
        "You keep saying that and it keeps failing", "That breaks {topic}", "{topic} is {still} not solved",
        "Nothing changed", "It crashed", "It fails at the first line", "Got an error with that",
        "{thanks} for nothing", "Great, now nothing works at all", "Well, that was {bad}", "Stop guessing",
        "That was no help with {topic}", "I'm {still} stuck", "{still} stuck on {topic}",
        "This is not working for me",
    ),
    "correction": (
        "No, I meant {topic}", "I meant {topic}", "Actually I asked about {topic}",
        "Actually, it's about {topic}", "Not that one, {topic}", "No, the other one", "No no, {topic}",
        "That's another thing, I need {topic}", "I was talking about {topic}", "What I wanted was {topic}",
        "You misunderstood, it's {topic}", "You got me wrong. {topic}, please", "Let me rephrase: {topic}",
        "To be clear, I mean {topic}", "I said {topic}, not this", "Please answer about {topic} instead",
        "Wrong one. I need {topic}", "Actually we don't do it like that any more",
        "Actually that changed last month", "It should be {topic}", "My question was {topic}",
        "No, shorter please", "No, I need more detail", "Rather {topic}, please",
        "Close, but I meant {topic}", "Almost. {topic} is what I'm after", "Sorry, I meant {topic}",
        "Correction: {topic}", "That's for the old version, we have the new one",
        "You mixed it up with something else", "Try again, but with {topic}",
        "Instead of this, tell me about {topic}",
    ),
    "confusion": (
        "{huh}?", "What?", "What do you mean?", "I don't understand", "I don't get it", "I'm confused",
        "Can you clarify?", "Could you explain that again?", "Now I'm more confused than before",
        "{huh}, what?", "That makes no sense to me", "Which one do you mean?",
        "What does that have to do with {topic}?", "Sorry, I can't follow", "You lost me",
        "Can you say that in plain English?", "How does that relate?", "I have no idea what that means",
        "Why would I do that?", "???", "Not sure I understand", "Where do I find that?",
        "Could you be more specific?", "{huh}? I asked about {topic}", "And what is that supposed to mean?",
        "Is that about {topic} or about something else?", "Can you give an example?",
        "Too much at once, where do I start?", "So is that a yes or a no?", "Lost me at the first sentence",
    ),
    "neutral": (
        "Okay", "ok", "Noted", "I'll have a look", "Let me try", "Let me check with {person}",
        "Will read it later", "And another question", "Moving on", "By the way, is the canteen open?",
        "brb", "Let me think about it", "I'll come back to this", "Another topic: the printer",
        "Where can I see my open tickets?", "Give me {minutes}", "Who else works on this?",
        "Will tell {person}", "Can you also do translations?", "How long are you around?", "I see", "Right",
        "Hm, ok", "Interesting", "Next one then", "What about next month?", "And for the others?",
        "I forwarded it to {person}", "Same for tomorrow?", "Remind me later",
    ),
    "broke_again": (
        "Actually it broke again", "Spoke too soon, it's broken again", "Hm, it stopped working",
        "I take that back, it doesn't work", "Actually no, {topic} is {still} wrong",
        "Update: it failed after all", "Correction, that was {bad}", "It worked once, then never again",
        "{sigh}, same error {still}", "Turns out that was wrong", "{person} checked, it's {bad}",
        "Sorry, it doesn't work after all",
    ),
    "works_after_all": (
        "Ah, my mistake, it works", "Oh wait, now it works, {thanks}", "Sorry, I misread. It's {good}",
        "Forget what I said, that {solved}", "OK I get it now, {thanks}", "Update: it {solved} after all",
        "My bad, you were right", "It needed a restart, now it's {good}",
        "I was in the wrong place. It works, {thanks}", "{person} showed me, your answer was right",
        "Ah, now I understand. {thanks}", "On second reading that's {good}",
    ),
}

EMOJI: Mapping[Tone, tuple[str, ...]] = {
    "praise": ("👍", "🙏", "🎉", "😊", "❤️", "💯", ":)", "\\o/"),
    "complaint": ("👎", "😡", "😞", "🤦", "😤", ":(", "🙄"),
    "correction": ("🙄", "😅", ":/"),
    "confusion": ("🤔", "😕", "❓", "🤷"),
    "neutral": ("🙂", "👀", "…"),
    "broke_again": ("😞", "😩", "👎"),
    "works_after_all": ("😅", "🙈", "👍"),
}

OPENERS: tuple[str, ...] = (
    "", "", "", "", "", "", "", "Oh, ", "Ah. ", "Well, ", "Hey, ", "OK so ", "Right, ", "Hmm. ",
    "Alright, ", "lol ",
)
CLOSERS: Mapping[Tone, tuple[str, ...]] = {
    "praise": ("", "", "", "", "!", "!!", ".", " Have a nice day.", " On to the next one.", " See you"),
    "complaint": ("", "", "", "", ".", "!", "!!", "...", " Anything else?", " We're losing money here."),
    "correction": ("", "", "", ".", "!", "...", " Sorry if that wasn't clear."),
    "confusion": ("", "", "", " Please.", " I'm new here."),
    "neutral": ("", "", "", ".", "..."),
    "broke_again": ("", "", ".", "...", " Sorry."),
    "works_after_all": ("", "", ".", "!", " Sorry for the noise."),
}
# fmt: on
