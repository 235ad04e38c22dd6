"""Word lists of the pattern extractor: negators, question words, chat spelling and others."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The blank-separated words of `text`."""
    return frozenset(text.split())


NEGATORS = words(
    "barely doesnt dont hardly isnt neither never no none nor not nothing nowhere scarcely without"
)
"""Reverse what follows."""

TRANSPARENT = words(
    "a actually all an answer answers any are as at be been being call code completely did do does "
    "entirely especially even exactly feel find for get getting got had have i in is it look looking "
    "looks much my of one particularly quite really seem seeming seems single so sound sounds super "
    "terribly that the them these think this those too totally very was way what working would you your"
)
"""May occur between a negator and what it reverses."""

IRREALIS = words(
    "anything anywhere be can could find hope hopefully hoping how if looking make makes making may might "
    "must need needs prefer recommend should some someone something somewhere suggest supposed to try "
    "trying unless until want wanting wants whatever where wherever whether whichever whose will wish "
    "would"
)
"""Praise after these is requested or wished, not given."""

FEARED = words(
    "avoid case catch cause causes could handle hopefully how if may might must possible prevent should "
    "unless when whether would"
)
"""A failure after these has not happened."""

SOLVED = words(
    "caught cleared eliminated fixed fixes handled handles removed resolved rid solved solves sorted"
)
"""A failure after these has been resolved."""

INTENSIFIERS = words(
    "absolutely always completely damn entirely exceptionally extremely freaking fucking incredibly "
    "insanely really remarkably so still such super totally truly utterly very"
)
"""A match after these counts twice."""

CONTRAST = words(
    "although but except however nevertheless nonetheless only sadly tho though unfortunately yet"
)
"""The part of a reply after these overrides the part before."""

AUXILIARY = words("am are can could did do does had has have is may might shall should was were will would")
"""Begin a question if a subject follows."""

SUBJECT_AFTER = words(
    "a an any anyone he i it my one she someone that the there these they this those u we you your"
)
"""Subjects that make a question with a preceding auxiliary."""

WH = words("how what when where which who whom whose why")
"""Begin a question if an auxiliary follows."""

REQUEST = words(
    "add assert book bump buy calculate call cancel change check compare compose compute convert create "
    "define delete describe display draft explain find fix generate get give help implement let lets list "
    "log look make mix move name need open order paste pick play please pls post print push put raise "
    "read recommend refactor remind remove reserve return run say schedule search send set share show "
    "split suggest sum summarize tell translate try turn update use want wrap write"
)
"""Verbs that begin a request at the start of a clause."""

COPULAS = words(
    "am are be been being feels is look looking looks reads seems sounding sounds tastes was were works"
)
"""Praise after these is a predicate, whatever follows."""

AFTER_PRAISE = words(
    "! advice again all already analysis and answer answers approach as because bot both breakdown bro "
    "buddy but call catch cheers choice detail details dude effort enough every exactly example examples "
    "except explanation find fix for guide haha help here i idea if in indeed info information insight it "
    "job just list lol man mate much my now of ok okay on one overview point really reply resource "
    "response result results service since sir so solution start stuff suggestion suggestions summary "
    "thank thanks that the then there thing this tip tips to today too tool very walkthrough we what with "
    "work work! write writeup yes you your"
)
"""May follow praise of an answer; before another word, praise is an attribute of that word."""

OPENERS = words(
    "also and but cool great hey hi hmm no nope now oh ok okay perfect so thanks then um well yeah yep yes"
)
"""Words that may precede the first relevant word of a clause."""

OTHERS = words(
    "my our his her their he she him people everyone somebody someone mum dad mother father wife husband"
)
"""As subject of a clause these show that it is not about the answer."""
REPORTED = words("has have had got rated score scored hotel movie film book review")
"""In a reply with a rating these show that the rating is not about the answer."""
ANSWERED = words("it that this these those you i we they he she the there my your not")
"""After "no" these begin a new statement."""
MOODS = words("today lately tonight this about because since at")
"""After a feeling these show that it is not about the answer: "happy today"."""
ANAPHORS = words("it this that these those you your yours they them both either neither one ones answer here")
"""Refer to the answer or to the assistant."""

SUBJECTS = words(
    "that it what he she there where who how let here everything this i you we they one nothing something "
    "when why "
    "code answer link page"
)
"""After these "'s", "'d" and the like are verbs."""
SUFFIXES = {"'s": "is", "'re": "are", "'m": "am", "'ve": "have", "'ll": "will", "'d": "would"}

_SHORT = """
can't=can not; cant=can not; cannot=can not; won't=will not; wont=will not; shan't=shall not
ain't=is not; aint=is not; let's=let us; y'all=you all; i'm=i am; im=i am; thx=thanks; thanx=thanks
tnx=thanks; tks=thanks; ty=thank you; tysm=thank you; tyvm=thank you; thnx=thanks; thankss=thanks
thank's=thanks; thans=thanks; thnks=thanks; ta=thanks; u=you; ur=your; r=are; pls=please; plz=please
k=ok; gr8=great; grate=great; gud=good; gj=good job; np=no problem; idk=i do not know; dunno=do not know
gonna=going to; wanna=want to; nvm=never mind; nevermind=never mind; yea=yes; ya=yes; yup=yes; yep=yes
lgtm=looks good; ftw=great; thankyou=thank you; incorect=incorrect; wrogn=wrong; worng=wrong; wrng=wrong
prefect=perfect; pefect=perfect; awsome=awesome; perfecto=perfect; realy=really; definately=definitely
exaclty=exactly; didnt=did not; doesnt=does not; dont=do not; isnt=is not; wasnt=was not; arent=are not
havent=have not; hasnt=has not; couldnt=could not; wouldnt=would not; shouldnt=should not; thats=that is
its=it is; whats=what is; youre=you are; ive=i have; theres=there is; theyre=they are; hes=he is
id=i would; amazeballs=amazing; appriciate=appreciate; apreciate=appreciate; brill=brilliant
fab=fabulous; cheerz=cheers; alright=okay; kk=ok; okey=ok
"""
EXPANSIONS: dict[str, tuple[str, ...]] = {
    pair.split("=")[0].strip(): tuple(pair.split("=")[1].split())
    for pair in _SHORT.replace("\n", ";").split(";")
    if pair.strip()
}
"""Chat spelling and common misspellings → words."""

EMOJI: dict[str, str] = {
    **dict.fromkeys("👍❤😊😀😃😄😁🎉🙌👏🔥💯✅😍🥰🤩👌💪🚀🥳😻💖💕💙💚💛🧡💜🤗😎⭐🌟✨🏆🤝😌☺🫶🤌", "P"),
    "🙏": "T",
    **dict.fromkeys("👎😡😠🤬😤😞😒💩❌😩😫😣😖😔☹🙁🤮🤢💔😾🚫😑🖕", "N"),
    **dict.fromkeys("🙄🤦🤡", "I"),
    **dict.fromkeys("🤔❓😕🤨🤷😵🧐😐", "Q"),
}
"""Kind of each emoji, of `patterns.KINDS`."""
EMOTICONS = {
    **dict.fromkeys([":)", ":-)", ":d", ":-d", ":))", ":]", "=)", ";)", ";-)", "<3", "^^", ":p", ":-p"], "P"),
    **dict.fromkeys([":(", ":-(", ":((", ":'(", ":c", "=(", ":[", "-_-"], "N"),
    **dict.fromkeys([":/", ":-/", ":\\", ":|", ":-|", ":s", ":x"], "q"),
}
"""Kind of each emoticon."""


def _whole(kind: str, replies: str) -> dict[str, str]:
    return dict.fromkeys((reply.strip() for reply in replies.split(",")), kind)


WHOLE: dict[str, str] = {
    **_whole("Q", "what, wat, eh, sorry, pardon, pardon me, excuse me, explain, meaning, say again, "
                  "sorry what, you what"),
    **_whole("q", "really, are you sure, hmm, hm, umm, hmmm, um, you sure"),
    **_whole("x", "no, nope, nah, noo, no no, no no no, negative, not that, other one"),
    **_whole("P", "good, right, exactly, yes exactly, indeed, true, agreed, love it, nice one, very good, "
                  "so good, "
                  "all good, yes perfect, precisely, yay, finally, works, fixed, solved, better, "
                  "right on, well done, fire, same energy, hell yeah, hell yes, yes yes yes"),
    **_whole("N", "not really, not quite, not exactly, not this, not it, still nothing, same, still no, "
                  "no change, still, empty, blank, nothing, whatever, bruh, come on, "
                  "oh come on, not good, "
                  "boring, cringe, enough"),
}  # fmt: skip
"""Kind of replies that consist of exactly these words."""
